"""The whole command where things are not as they should be: `sh` scripts that close streams, fill disks and remove folders.

Each script runs `llmfs` in a process of its own in a folder that already holds a tokenizer, data and a model. What may come of it:

    works      exit status 0, and what it made is what it makes undisturbed
    one line   exit status 1 or 2, one line that says why, and every file that was there is as it was
    silent     the same without a line, where there is nowhere to say it
    not said   the same, but the files are new and whole: only the report could not be written
    quiet      exit status 141: whoever read the output has gone
"""
import os, re, shutil, subprocess, sys
from pathlib import Path

from common import ROOT, Tally, scratch
from kills import SHAPE, torn_files, tree

SMALL = ' '.join(SHAPE)
COMMANDS = {
    'info': 'llmfs info',
    'tokenizer train': 'llmfs tokenizer train --corpus text.txt --kind words --out tokenizer.json',
    'tokenizer encode': 'llmfs tokenizer encode --tokenizer run Once upon a time',
    'tokenizer decode': 'llmfs tokenizer decode --tokenizer run 1 2 3',
    'data': 'llmfs data --corpus text.txt --tokenizer run --out data',
    'train': f'llmfs train --data data --out new --steps 4 {SMALL}',
    'train, resumed': 'llmfs train --out run --resume --steps 12',
    'generate': 'llmfs generate --model run --prompt Once --max-new-tokens 4',
    'eval': 'llmfs eval --model run --corpus text.txt',
}
READS = {'tokenizer encode': 'llmfs tokenizer encode --tokenizer run', 'generate': 'llmfs generate --model run --max-new-tokens 4'}     # from standard input
WRITES = 'tokenizer train', 'data', 'train', 'train, resumed'

CONDITIONS = {
    'undisturbed': '$COMMAND',
    'standard input closed': '$READING <&-',
    'standard output closed': '$COMMAND >&-',
    'standard error closed': '$COMMAND 2>&-',
    'all streams closed': '$COMMAND <&- >&- 2>&-',
    'output to a full disk': '$COMMAND >/dev/full',
    'nobody reads the output': '{ sleep 1; $COMMAND; echo $? >"$STATUS"; } | true; exit "$(cat "$STATUS")"',
    'folder is read-only': 'chmod -R a-w . && $WITHOUT_POWERS sh -c \'$COMMAND\'; status=$?; chmod -R u+w .; exit $status',
    'disk is full': '''unshare -rm sh -c 'mount -t tmpfs -o size=2m none "$DISK" && cp -r . "$DISK" && cd "$DISK" && { cat /dev/zero >fill 2>/dev/null; $COMMAND; }
                       status=$?; rm -f fill; cp -r . "$COPY"; exit $status' ''',
    'files may not grow': 'ulimit -f 0; $COMMAND',
    'two at once': '{ $COMMAND; echo $? >"$STATUS"; } & $COMMAND; status=$?; wait; echo "the other: $(cat "$STATUS")"; exit $status',
    'folder has gone': 'rm -r "$PWD"; $COMMAND',
    'folder goes during the run': '{ while [ ! -e new/log.jsonl ]; do sleep .01; done; rm -r new; } & $ENDLESS; status=$?; wait; exit $status',
}


def possible(condition):
    "Why a condition cannot be made on this machine; nothing if it can."
    if condition == 'disk is full' and subprocess.run(['unshare', '-rm', 'sh', '-c', 'mount -t tmpfs none /mnt'], capture_output=True).returncode: return 'no file system may be mounted here'
    if condition == 'folder is read-only' and os.geteuid() == 0 and not shutil.which('setpriv'): return 'the superuser may write anywhere'
    if condition == 'output to a full disk' and not Path('/dev/full').exists(): return 'there is no /dev/full'
    return ''


def script(command, condition):
    "The script of a cell of the table; empty where the two do not meet."
    if condition == 'folder goes during the run' and command != 'train': return ''
    if condition in ('disk is full', 'files may not grow', 'two at once', 'folder is read-only') and command not in WRITES: return ''
    words = COMMANDS[command]
    text = CONDITIONS[condition].replace('$ENDLESS', words.replace('--steps 4', '--seconds 6 --save-every 2')).replace('$READING', READS.get(command, words))
    powers = 'setpriv --bounding-set=-all --inh-caps=-all' if os.geteuid() == 0 else ''
    text = text.replace('$WITHOUT_POWERS', powers)
    return text.replace('$COMMAND', words).replace('llmfs ', f'{sys.executable} -m llm_from_scratch.cli ')


def prepare(home):
    "The folder that every script finds."
    from llm_from_scratch import cli
    from llm_from_scratch.storyland import stories
    folder = home/'before'
    folder.mkdir()
    os.chdir(folder)
    Path('text.txt').write_text('\n\n'.join(story.text for story in stories(30, seed=1)))
    Path('other.txt').write_text('\n\n'.join(story.text for story in stories(30, seed=2)))
    from llm_from_scratch.text import CharTokenizer
    CharTokenizer.train([Path('text.txt').read_text(), Path('other.txt').read_text()], ['<|endoftext|>']).save('tokenizer.json')
    for words in ('data --corpus other.txt --tokenizer tokenizer.json --out data', f'train --data data --out run --steps 6 --save-every 3 {SMALL}'):
        done = subprocess.run([sys.executable, '-m', 'llm_from_scratch.cli', *words.split()], env=environment(), capture_output=True, text=True)
        if done.returncode: raise SystemExit(done.stderr)
    os.chdir(home)
    return folder, cli


def environment(**more): return {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **more}


def tell(home, command, condition, before, whole):
    "Run one script: what came of it, in words, its exit status and its last line."
    folder, copy = home/'now'/'folder', home/'copy'
    for place in (home/'now', copy, home/'status'): shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
    shutil.copytree(before, folder)
    for place in (home/'disk', copy): place.mkdir(exist_ok=True)
    env = environment(DISK=str(home/'disk'), COPY=str(copy), STATUS=str(home/'status'))
    done = subprocess.run(['sh', '-c', script(command, condition)], cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors='replace', timeout=120)
    found, said = copy if condition == 'disk is full' else folder, [line for line in done.stderr.splitlines() if line]
    also = re.search(r'the other: (\d+)', done.stdout)
    outcome = judge(command, condition, [done.returncode, *([int(also[1])] if also else [])], said, before, found, whole)
    return outcome, done.returncode, (said or [''])[-1]


def judge(command, condition, statuses, said, before, found, whole):
    "One of the outcomes, or `fault: …`."
    lines = [line for line in said if not re.match(r'llmfs: ([\d,]+ parameters on|resumed with another)', line)]
    if any('Traceback' in line or 'Exception ignored' in line or 'unexpected' in line for line in said): return f'fault: {said[-1]}'
    gone = condition.startswith('folder') and condition != 'folder is read-only'
    if not gone and (lost := damage(before, found)): return f'fault: {lost}'
    status, new = max(statuses), '' if gone else changed(before, found)
    as_whole = whole is None or gone or all(files(found).get(name) == data for name, data in whole.items())
    if condition == 'two at once' and 0 in statuses: return 'works' if status == 0 else 'one works, the other: one line' if status == 1 else f'fault: exit status {status}'
    if status == 0:
        if condition in ('output to a full disk', 'files may not grow'): return 'fault: exit status 0'
        return 'works' if as_whole else 'fault: exit status 0, but the result is another'
    if status == 141: return 'quiet'
    if status not in (1, 2): return f'fault: exit status {status}'
    if condition == 'two at once': return 'fault: neither works'
    nowhere = condition in ('standard error closed', 'all streams closed')
    if len(lines) != 1 and not (nowhere and not lines): return f'fault: {len(lines)} lines'
    if new and not (as_whole and whole is not None): return f'fault: exit status {status}, but {new} is another'
    return 'not said' if new else 'silent' if not lines else 'one line'


def damage(before, found):
    "A file that was there and is now gone or torn, a log with a step twice; empty if there is none."
    was, now = files(before), files(found)
    gone = [name for name in was if name not in now and not name.startswith('run/step-')]
    if gone: return f'{gone[0]} is gone'
    if torn := torn_files(found): return f'torn: {torn[0][:200]}'
    for path in found.rglob('log.jsonl'):
        steps = re.findall(r'"step": (\d+)', path.read_text())
        if len(set(steps)) < len(steps): return f'{path.name} has steps {" ".join(steps)}'
    return ''


def changed(before, found):
    "A file that was there before and holds something else now."
    was, now = files(before), files(found)
    return next((name for name in was if name in now and now[name] != was[name]), '')


def files(folder): return tree(folder) if folder.exists() else {}


def run(commands=COMMANDS, conditions=CONDITIONS, done=lambda command, row: None):
    "The table: command → condition → outcome, exit status and the last line that was said; and its tally."
    table, tally = {}, Tally()
    with scratch() as home:
        before, _ = prepare(home)
        missing = {condition: why for condition in CONDITIONS if (why := possible(condition))}
        for command in commands:
            row, whole = {}, None
            for condition in CONDITIONS:
                if not script(command, condition) or condition not in {*conditions, 'undisturbed'}: continue
                if condition in missing: outcome, status, said = 'not possible here', None, missing[condition]
                else: outcome, status, said = tell(home, command, condition, before, whole)
                if condition == 'undisturbed' and command in WRITES: whole = tree(home/'now'/'folder')
                row[condition] = {'outcome': outcome, 'status': status, 'said': said.replace(str(home), '…').replace(sys.prefix, '…')[:200]}
            table[command] = row
            done(command, row)
    for command, row in table.items():
        for condition, cell in row.items():
            tally.add('scripts')
            if cell['outcome'].startswith('fault'): tally.fault('under a condition', f'{command}, {condition}: {cell}')
            else: tally.add(cell['outcome'])
    return table, tally


def show(command, row):
    for condition, cell in row.items(): print(f'{command:18} {condition:28} {cell["status"]!s:5} {cell["outcome"]:24} {cell["said"]}', flush=True)


if __name__ == '__main__': print(run(sys.argv[1:] or COMMANDS, done=show)[1].to_json()['counts'])
