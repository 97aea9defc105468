"""EPUB and PDF."""
def build_epub(work): raise NotImplementedError
def build_pdf(work): raise NotImplementedError
