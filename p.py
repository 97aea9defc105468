import sys
def f(): print("x", file=sys.stderr)
def g(f): print("x", file=f)
def h(): print("x", file=sys.stdout)
