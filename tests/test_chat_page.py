"""The chat page in Chromium: against a small server that can be made to do anything, and against the real one with the model that comes along."""
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import urllib.request

import pytest
from browser import WIDTHS, needs_browser, violations, window
from fake_api import FOXES, HOSTILE, PAGE, fake_server

ROOT = PAGE.parent.parent.parent
INPUTS = ['llm_from_scratch/pages/*', 'llm_from_scratch/models/*/*', 'imports:llm_from_scratch/cli.py']
HTML = PAGE.read_text(encoding='utf-8')


# The file ---------------------------------------------------------------------------------------------------------

def part(tag): return re.search(f'<{tag}>(.*?)</{tag}>', HTML, re.S)[1]


def test_policy_allows_the_script_and_the_style_and_nothing_else():
    def hashed(tag): return f"'sha256-{base64.b64encode(hashlib.sha256(part(tag).encode()).digest()).decode()}'"
    policy = re.search('http-equiv="Content-Security-Policy" content="([^"]*)"', HTML)[1]
    assert policy == (f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; connect-src 'self'; img-src data:; "
                      "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'")
    assert HTML.count('<script') == HTML.count('<style') == 1 and not re.search(r'<[^>]* (on\w+|style)=', re.sub('(?s)<script>.*', '', HTML))
    assert HTML.index('Content-Security-Policy') < HTML.index('<style') < HTML.index('<script>')


def test_page_asks_no_other_host_and_writes_no_markup():
    assert set(re.findall(r'https?://[\w.:]+', HTML)) <= {'http://www.w3.org', 'http://127.0.0.1:8000'}       # a namespace, and the line for a terminal
    assert not re.search(r'innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|eval\(|Function\(|Storage|indexedDB|cookie', part('script'))


def test_without_javascript_the_page_says_what_to_do():
    outside = re.search('<noscript>(.*?)</noscript>', HTML, re.S)[1]
    sent = json.loads(re.search("-d '(.*?)'", outside, re.S)[1])
    assert sent == {'model': 'storyland', 'stream': True, 'prompt': 'Once upon a time', 'max_tokens': 60} and '/v1/completions' in outside
    assert re.search('<div id="app"[^>]* hidden>', HTML) and '[hidden] { display: none !important }' in part('style')


# In a browser -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def server():
    with fake_server() as fake: yield fake


@pytest.fixture(scope='session')
def tab(chromium):
    "One window for all tests: what costs is not the page but the process that shows it."
    with window(chromium, permissions=['clipboard-read', 'clipboard-write']) as opened: yield opened


@pytest.fixture
def visit(tab, server):
    "Load the page afresh; the function returns it with its complaints, among which a refusal of the server is none."
    page, complaints = tab

    def load(width='desk', **media):
        server.forget()
        complaints.clear()
        page.set_viewport_size({'width': WIDTHS[width], 'height': 844})
        page.emulate_media(**{'color_scheme': 'light', 'reduced_motion': 'no-preference', **media})
        page.goto(server.url)
        page.locator('#starts button' if not server.key else '#notice').first.wait_for()
        return page, complaints

    yield load
    server.stopping = True
    page.goto('about:blank')                       # a page whose caret blinks keeps a core busy until the last test of all


def say(page, words, wait=True):
    page.locator('#message').fill(words)
    page.locator('#message').press('Enter')
    if wait: rest(page)


def rest(page): page.locator('#send').wait_for()
def answer(page): return page.locator('.model .words').last.inner_text()
def last_fault(page): return page.locator('.fault').last.inner_text()
def own(complaints): return [c for c in complaints if not c.startswith('Failed to load resource: the server responded with a status of 4')]


def sentences(page):
    "Start to note what a screen reader is told."
    page.evaluate("""window.said = []; new MutationObserver(() => { const words = document.getElementById('status').textContent; if (words) window.said.push(words) })
                     .observe(document.getElementById('status'), {childList: true, characterData: true, subtree: true})""")
    return lambda: page.evaluate('new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(window.said))))')


@needs_browser
def test_a_conversation(visit, server):
    page, complaints = visit()
    assert page.locator('#model option').all_inner_texts() == ['talker', 'teller', 'unknown', ' '.join(HOSTILE.split())]
    assert page.evaluate('document.activeElement.id') == 'message'
    said = sentences(page)
    page.locator('#system').fill('  Be brief. ')
    page.locator('#temperature').fill('0.3')
    page.locator('#top-p').fill('0.7')
    page.locator('#most').fill('17')
    page.locator('#seed').fill('5')
    page.locator('#message').focus()
    for key in ('H', 'i', 'Shift+Enter', 'y', 'o', 'u', 'Enter'): page.keyboard.press(key)
    rest(page)
    assert answer(page) == 'You said: Hi\nyou' and page.locator('.user .words').inner_text() == 'Hi\nyou' and page.locator('#message').input_value() == ''
    assert said() == ['You said: Hi\nyou']                    # once, at its end
    assert page.locator('.model .facts').inner_text() == '3 tokens · seed 5'
    say(page, 'More')
    options = {'model': 'talker', 'temperature': .3, 'top_p': .7, 'seed': 5, 'max_completion_tokens': 17, 'stream': True, 'stream_options': {'include_usage': True}}
    first = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi\nyou'}]
    assert server.asked == [('/v1/chat/completions', None, {**options, 'messages': first}),
                            ('/v1/chat/completions', None, {**options, 'messages': [*first, {'role': 'assistant', 'content': 'You said: Hi\nyou'}, {'role': 'user', 'content': 'More'}]})]
    say(page, '   ')                                          # nothing to send
    page.locator('#seed').fill('')
    say(page, 'A')
    page.locator('.model').last.get_by_text('Retry').click()
    rest(page)
    assert len(server.asked) == 4 and server.asked[-1][2]['seed'] != server.asked[-2][2]['seed'] and server.asked[-1][2]['messages'] == server.asked[-2][2]['messages']
    assert f"seed {server.asked[-1][2]['seed']}" in page.locator('.facts').last.inner_text()
    assert complaints == []


@needs_browser
def test_retry_edit_copy_clear_and_undo(visit, server):
    page, complaints = visit()
    say(page, 'one')
    say(page, 'two')
    page.locator('.model').last.get_by_text('Retry').click()
    rest(page)
    assert page.locator('.turn').count() == 4 and [m['content'] for m in server.asked[-1][2]['messages']] == ['one', 'You said: one', 'two']
    page.locator('.model').first.get_by_text('Copy').click()
    page.get_by_text('Copied').first.wait_for()
    assert page.evaluate('navigator.clipboard.readText()') == 'You said: one'
    assert page.get_by_role('button', name='Edit').count() == 1
    page.get_by_role('button', name='Edit').click()
    assert page.locator('#message').input_value() == 'two' and page.locator('#notice').is_visible()
    page.keyboard.press('Escape')
    assert page.locator('#message').input_value() == '' and page.locator('#notice').is_hidden() and page.locator('.turn').count() == 4
    page.get_by_role('button', name='Edit').click()
    say(page, 'three')
    assert page.locator('.user .words').all_inner_texts() == ['one', 'three'] and page.locator('.model').count() == 2
    assert [m['content'] for m in server.asked[-1][2]['messages']] == ['one', 'You said: one', 'three']
    page.locator('#clear').click()
    assert page.locator('#welcome').is_visible() and page.locator('.turn').count() == 0
    page.get_by_role('button', name='Undo').click()
    assert page.locator('.turn').count() == 4 and answer(page) == 'You said: three'
    page.locator('#clear').click()
    say(page, 'fresh')
    assert server.asked[-1][2]['messages'] == [{'role': 'user', 'content': 'fresh'}] and page.locator('#notice').is_hidden()
    assert complaints == []


@needs_browser
def test_stopping_reaches_the_server(visit, server):
    page, complaints = visit()
    for way in ('Escape', 'button', 'New', 'leave'):
        page.locator('#clear').click()
        server.gone.clear()
        say(page, 'sleep', wait=False)
        page.locator('.model .words', has_text='zzz zzz').wait_for()
        assert page.locator('.model').get_attribute('aria-busy') == 'true' and page.locator('.caret').is_visible() and page.locator('#send').is_hidden()
        if way == 'Escape': page.keyboard.press('Escape')
        elif way == 'leave': page.goto('about:blank')
        else: page.locator('#stop' if way == 'button' else '#clear').click()
        assert server.gone.wait(10), way
        if way == 'leave': break
        rest(page)
        assert page.evaluate('document.activeElement.id') == 'message'
        if way == 'New': continue
        text = page.locator('.model .words').evaluate('e => e.textContent')
        assert 'stopped' in page.locator('.facts').inner_text() and text.startswith('zzz zzz') and page.locator('.caret').count() == 0
        say(page, 'next')
        assert [m['content'] for m in server.asked[-1][2]['messages']] == ['sleep', text, 'next']
    assert complaints == []


@needs_browser
def test_stream_may_be_cut_at_any_byte(visit):
    page, complaints = visit()
    for words in ('foxes', 'drip'):
        say(page, words)
        assert page.locator('.model .words').last.evaluate('e => e.textContent') == FOXES
    found = page.evaluate("""async text => {
      const raw = new TextEncoder().encode(text), wrong = []
      const read = async cuts => {
        const body = new ReadableStream({start(c) { cuts.concat(raw.length).reduce((from, to) => (c.enqueue(raw.slice(from, to)), to), 0); c.close() }})
        const found = []
        for await (const data of events({body})) found.push(data)
        return JSON.stringify(found)
      }
      const whole = await read([])
      for (let i = 0; i <= raw.length; i++) if (await read([i]) !== whole) wrong.push(i)
      if (await read([...raw.keys()]) !== whole) wrong.push('single bytes')
      return [JSON.parse(whole), wrong]
    }""", '\ufeffdata: ä🦊\r\n\r\ndata:b\rdata\rdata: c\r\revent: x\nid: 1\n: no\n\nretry: 9\ndata:  d\n\r\ndata: [DONE]\n\ndata: lost')
    assert found == [['ä🦊', 'b\nc', ' d', '[DONE]'], []]
    assert complaints == []


@needs_browser
@pytest.mark.parametrize('model', ['talker', 'teller'])
def test_a_hostile_answer_is_text(visit, server, model):
    page, complaints = visit()
    page.locator('#probabilities').check()
    page.locator('#model').select_option(model)
    page.locator('#message').fill(f'hostile {HOSTILE}')
    page.keyboard.press('Enter')
    rest(page)
    assert page.locator('.model .words').evaluate('e => e.textContent') == HOSTILE and page.locator('.user .words').evaluate('e => e.textContent') == f'hostile {HOSTILE}'
    for token in page.locator('.token').all()[:3]:
        token.hover()
        page.locator('#peek .chosen').wait_for()
    for words in ('wrong', 'midway'):
        if model == 'teller': page.locator('#clear').click()
        say(page, words)
        assert 'onerror=' in last_fault(page)
    page.locator('#model').select_option(HOSTILE)
    assert page.locator('#where').evaluate('e => e.textContent') == HOSTILE
    assert page.evaluate("document.querySelectorAll('#app :is(img, script, b:not(.legend b), i)').length") == 0 and page.title() == 'Chat · LLM from Scratch'
    assert own(complaints) == []
    page.evaluate("try { document.body.innerHTML = '<p>' } catch (error) { window.refused = error.name }")         # the policy refuses what the page never does
    assert page.evaluate('window.refused') == 'TypeError'


FAULTS = {
    'wrong': f'Temperature must be at least 0, got {HOSTILE}.', 'broken': 'The server failed (500).', 'garbage': 'The server sent something that is not an answer.',
    'half': 'The connection to the server ended in the middle of the answer.', 'hang up': 'The server does not answer. Look whether it is still running.',
    'midway': f"The server could not go on. The engine {HOSTILE.replace(chr(34), chr(39))} stopped.", 'busy': 'The server is busy. Try again in 1 second.',
}


@needs_browser
def test_errors_are_sentences(visit, server):
    page, complaints = visit()
    told = sentences(page)
    for words, sentence in FAULTS.items():
        page.locator('#clear').click()
        say(page, words)
        shown = page.locator('.fault').evaluate('e => e.textContent')
        assert shown == sentence or (words == 'busy' and shown == 'The server was busy. Try again now.')
        assert page.locator('.caret').count() == 0 and page.locator('.model .words').evaluate('e => e.textContent') == ('Half of an' if words in ('half', 'midway') else '')      # what came stays
    assert told() == list(FAULTS.values())
    page.get_by_role('button', name='Retry').click()          # there when it is time
    page.locator('.model .words', has_text='Now there is room.').wait_for()
    rest(page)
    assert page.locator('.fault').count() == 0 and [body['messages'][-1]['content'] for *_, body in server.asked][-2:] == ['busy', 'busy']
    for words, answered in (('wrong', False), ('half', True)):                    # a question without an answer is not asked again
        page.locator('#clear').click()
        say(page, words)
        say(page, 'and now')
        assert answer(page) == 'You said: and now' and len(server.asked[-1][2]['messages']) == (3 if answered else 1)
    assert [c for c in own(complaints) if 'status of 500' not in c and 'ERR_' not in c] == []


@needs_browser
def test_key_is_asked_for_sent_and_never_kept(visit, server):
    page, _ = visit()
    server.key = 'sesame'
    page.reload()
    page.locator('#notice', has_text='The server asks for an API key').wait_for()
    assert page.evaluate('document.activeElement.id') == 'key' and page.locator('#key').get_attribute('type') == 'password'
    for key in ('schlüssel', 'wrong', 'sesame'):
        page.locator('#key').fill(key)
        page.keyboard.press('Tab')
        page.locator('#notice', has_text={'schlüssel': 'only letters, digits and signs of ASCII'}.get(key, 'The server asks')).wait_for(state='visible' if key != 'sesame' else 'hidden')
    say(page, 'hello')
    assert server.asked[-1][1] == 'Bearer sesame'
    assert page.evaluate('localStorage.length + sessionStorage.length + document.cookie.length') == 0 and 'sesame' not in page.content() + page.url
    page.reload()
    page.locator('#notice', has_text='The server asks for an API key').wait_for()
    assert page.locator('#key').input_value() == ''


@needs_browser
def test_a_server_that_is_not_there(visit, server):
    page, _ = visit()
    page.route('**/v1/models', lambda route: route.abort())
    page.evaluate('loadModels()')
    page.locator('#notice', has_text='The server does not answer.').wait_for()
    page.unroute('**/v1/models')
    page.get_by_role('button', name='Try again').click()
    page.locator('#notice').wait_for(state='hidden')
    assert page.locator('#model option').count() == 4


@needs_browser
@pytest.mark.parametrize('model', ['teller', 'unknown'])
def test_a_model_without_chat_template_continues_a_story(visit, server, model):
    page, complaints = visit()
    page.locator('#model').select_option(model)
    if model == 'teller':
        assert 'has no chat template' in page.locator('#about').inner_text() and page.locator('#system').is_hidden()
        page.locator('#starts button').first.click()
        rest(page)
        assert server.asked[0][2]['prompt'] == 'Once upon a time there was a little girl'
        page.locator('#clear').click()
    say(page, 'Mia had a boat. ')                             # `unknown` is asked to chat first, and refuses
    assert page.locator('#where').inner_text() == model and page.locator('#app').get_attribute('data-mode') == 'story'
    assert [path for path, *_ in server.asked] == ['/v1/completions' if model == 'teller' else '/v1/chat/completions', '/v1/completions']
    say(page, 'She went')
    say(page, '')                                             # nothing added: it goes on
    story = 'Mia had a boat.'
    for added in ('', ' She went', ''):
        story += added
        story += f' and {story[-20:].strip()}'
    assert page.locator('#turns').evaluate("e => [...e.querySelectorAll('.words')].map(w => w.textContent).join('')") == story
    prompts = [body['prompt'] for path, _, body in server.asked if path == '/v1/completions'][-3:]
    assert prompts[0] == 'Mia had a boat.' and prompts[1].endswith('boat. She went') and story.startswith(prompts[2])
    assert {'max_tokens', 'prompt', 'stream'} <= set(server.asked[-1][2]) and 'messages' not in server.asked[-1][2]
    page.get_by_role('button', name='Retry').click()
    rest(page)
    assert server.asked[-1][2]['prompt'] == prompts[2] and page.get_by_role('button', name='Retry').count() == 1
    page.get_by_role('button', name='Edit').click()
    say(page, 'He ran')
    assert server.asked[-1][2]['prompt'] == prompts[1].removesuffix(' She went') + ' He ran'
    assert own(complaints) == []


# Probabilities ----------------------------------------------------------------------------------------------------

@needs_browser
@pytest.mark.parametrize('model', ['talker', 'teller'])
def test_probabilities_by_mouse_and_keyboard(visit, server, model):
    page, complaints = visit()
    page.locator('#model').select_option(model)
    say(page, 'no tokens')
    assert 'logprobs' not in server.asked[-1][2] and page.locator('.token').count() == 0
    page.locator('#probabilities').check()
    page.locator('#clear').click()
    say(page, 'a b c')
    assert {k: server.asked[-1][2].get(k) for k in ('logprobs', 'top_logprobs')} == ({'logprobs': True, 'top_logprobs': 5} if model == 'talker' else {'logprobs': 5, 'top_logprobs': None})
    tokens = page.locator('.token')
    texts = tokens.all_text_contents()
    assert texts == (['You', ' said:', ' a', ' b', ' c'] if model == 'talker' else [' and', ' a', ' b', ' c'])[:len(texts)] and len(texts) >= 4
    assert [c.split()[1] for c in tokens.evaluate_all('es => es.map(e => e.className)')][:4] == ['p1', 'p2', 'p3', 'p4']
    page.locator('#peek').wait_for(state='hidden')
    tokens.nth(1).hover()
    page.locator('#peek').wait_for()
    assert page.locator('#peek p').inner_text() == 'Probability 67\u00a0%, 0.40 nats'
    assert page.locator('#peek tr').first.inner_text().split() == ['␣' + texts[1].strip(), '67', '%', 'chosen'] and page.locator('#peek tr').count() == 2
    page.locator('#peek').hover()                             # may be pointed at, too
    page.wait_for_timeout(250)
    assert page.locator('#peek').is_visible()
    page.keyboard.press('Escape')
    assert page.locator('#peek').is_hidden()
    tokens.nth(1).click()                                     # a click holds it, wherever the mouse goes
    page.locator('#message').hover()
    page.wait_for_timeout(250)
    assert page.locator('#peek').is_visible()
    page.keyboard.press('Escape')
    page.locator('.model .words').focus()
    for key, at in (('ArrowRight', 0), ('ArrowRight', 1), ('ArrowRight', 2), ('ArrowLeft', 1), ('ArrowLeft', 0), ('ArrowLeft', 0)):
        page.keyboard.press(key)
        assert page.locator('.token.on').text_content() == texts[at] and page.locator('#peek .chosen .t').inner_text() == texts[at].replace(' ', '␣')
    page.locator('#probabilities').uncheck()
    assert page.locator('#peek').is_hidden() and page.locator('.model .words').get_attribute('tabindex') is None
    tokens.nth(1).hover()
    assert page.locator('#peek').is_hidden() and complaints == []


@needs_browser
def test_characters_of_several_tokens_and_cut_answers(visit):
    page, complaints = visit('phone')
    page.locator('#toggle').click()
    page.locator('#probabilities').check()
    page.locator('#done').click()
    page.locator('#message').fill('foxes')
    page.locator('#send').click()
    rest(page)
    assert ''.join(page.locator('.token').all_text_contents()) == page.locator('.model .words').evaluate('e => e.textContent') == FOXES
    page.locator('.token', has_text='🦊').first.click()
    assert page.locator('#peek p').inner_text().startswith('4 tokens make this character.')
    page.locator('.user .words').click()
    page.locator('#peek').wait_for(state='hidden')
    cut = page.evaluate("""() => {
      const t = text => token(text, -0.5, null, []), turn = {text: 'one two', tokens: [t('one'), t(' two'), t(' STOP')]}
      const words = new Words(turn), other = new Words({text: 'one twice', tokens: [t('one'), t(' two')]})
      return [words, other].map(w => [w.element.textContent, w.element.querySelectorAll('.token').length])
    }""")
    assert cut == [['one two', 2], ['one twice', 1]] and complaints == []


# For everyone -----------------------------------------------------------------------------------------------------

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth + Math.max(0, ...[...document.querySelectorAll('#sheet, #settings, #desk')].map(e => e.scrollWidth - e.clientWidth))"


@needs_browser
def test_axe_finds_nothing_and_all_fits(visit, server):
    page, complaints = visit('phone')
    found = []

    def look(where, width, theme):
        page.set_viewport_size({'width': WIDTHS[width], 'height': 844})
        page.emulate_media(color_scheme=theme, reduced_motion='reduce')
        rules = {'runOnly': {'type': 'tag', 'values': ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']}}
        found.extend((where, *v) for v in violations(page, **rules))
        found.extend((where, width, 'too wide') for width in WIDTHS if too_wide(page, width))

    page.locator('#toggle').click()
    page.locator('#probabilities').check()
    look('settings', 'phone', 'light')
    page.set_viewport_size({'width': 390, 'height': 844})
    page.keyboard.press('Escape')
    assert page.evaluate('document.activeElement.id') == 'toggle' and page.locator('#settings').is_hidden()
    for words in ('foxes', 'long', 'x' * 400, 'wrong'): say(page, words)
    page.locator('.token').nth(3).click()
    page.locator('#peek').wait_for()
    look('conversation', 'desk', 'light')
    look('conversation', 'phone', 'dark')
    page.evaluate("document.getElementById('model').value = 'teller'; choose()")
    look('welcome', 'desk', 'dark')
    say(page, 'A story')
    assert not any(too_wide(page, width) for width in WIDTHS) and not found and own(complaints) == []


def too_wide(page, width):
    page.set_viewport_size({'width': WIDTHS[width], 'height': 844})
    return page.evaluate(OVERFLOW) > 0


@needs_browser
def test_focus_order_and_motion(visit):
    page, _ = visit(reduced_motion='reduce')
    page.locator('.skip').focus()
    order = []
    for _ in range(16):
        order.append(page.evaluate("(e => e.id || e.className || e.textContent.slice(0, 80))(document.activeElement)"))
        assert page.evaluate("(e => getComputedStyle(e).outlineStyle !== 'none' || getComputedStyle(e.closest('.box') ?? e).boxShadow !== 'none')(document.activeElement)"), order[-1]
        page.keyboard.press('Tab')
    assert order[:10] == ['skip', 'clear', 'model', 'system', 'temperature', 'top-p', 'most', 'seed', 'probabilities', 'key']
    assert order[10:] == ['sheet', *page.locator('#starts button').all_text_contents(), 'message', 'send']
    say(page, 'sleep', wait=False)
    page.locator('.caret').wait_for()
    assert page.locator('.caret').evaluate('e => getComputedStyle(e).animationName') == 'none'
    page.locator('#message').fill('waits')
    page.keyboard.press('Enter')                              # while it writes, nothing is sent and nothing lost
    assert page.locator('#message').input_value() == 'waits' and page.locator('.user').count() == 1
    page.keyboard.press('Escape')
    page.locator('#most').fill('0')
    say(page, 'refused')
    assert page.locator('.user').count() == 1 and page.evaluate('document.activeElement.id') == 'most'


# The real server --------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def real():
    "`llmfs serve`, as a reader starts it, with the model that comes along."
    pytest.importorskip('uvicorn', reason='the server is an extra: serve')
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen([sys.executable, '-m', 'llm_from_scratch.cli', 'serve', '--model', 'storyland', '--port', '0', '--device', 'cpu'], stdout=subprocess.PIPE, text=True, env=environment)
    process.url = re.search(r'http://127\.0\.0\.1:\d+', process.stdout.readline())[0]
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def get(url, body=None):
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, {'Content-Type': 'application/json'})
    with urllib.request.urlopen(request, timeout=60) as answer: return answer.read().decode()


def gauge(real, name): return float(re.search(rf'^llmfs_{name} (\S+)$', get(f'{real.url}/metrics'), re.M)[1])


@needs_browser
def test_stories_from_the_real_server(tab, real):
    page, complaints = tab
    complaints.clear()
    page.set_viewport_size({'width': 1280, 'height': 844})
    page.emulate_media(reduced_motion='reduce')
    answer = page.goto(real.url)
    page.locator('#starts button').first.wait_for()
    assert answer.text() == HTML and "default-src 'none'" in answer.headers['content-security-policy'] and "frame-ancestors 'none'" in answer.headers['content-security-policy']
    assert page.locator('#where').inner_text() == 'storyland' and page.locator('#app').get_attribute('data-mode') == 'story'
    for name, value in (('seed', '5'), ('most', '20'), ('temperature', '1'), ('top-p', '1')): page.locator(f'#{name}').fill(value)
    page.locator('#probabilities').check()
    page.locator('#starts button').first.click()
    rest(page)
    asked = {'model': 'storyland', 'prompt': 'Once upon a time there was a little girl', 'max_tokens': 20, 'seed': 5}
    (told,) = json.loads(get(f'{real.url}/v1/completions', {**asked, 'logprobs': 5}))['choices']
    assert page.locator('.model .words').evaluate('e => e.textContent') == told['text'] and told['text'].startswith(' ')
    assert page.locator('.facts').inner_text().startswith('20 tokens') and 'seed 5' in page.locator('.facts').inner_text()
    assert page.locator('.token').all_text_contents() == told['logprobs']['tokens']
    page.locator('.token').nth(4).hover()
    shown = page.locator('#peek p').inner_text()
    assert shown.endswith(f"{-told['logprobs']['token_logprobs'][4]:.2f} nats") and page.locator('#peek tr').count() >= 5
    page.keyboard.press('Escape')
    say(page, '')                                             # it goes on from there
    (more,) = json.loads(get(f'{real.url}/v1/completions', {**asked, 'prompt': asked['prompt'] + told['text']}))['choices']
    assert page.locator('.model .words').last.evaluate('e => e.textContent') == more['text']
    page.locator('#most').fill('5000')
    say(page, '')
    assert last_fault(page).startswith('Max_tokens must be a whole number from 0 to 4096, got 5000')
    page.locator('#most').fill('900')
    page.get_by_role('button', name='Retry').click()
    page.locator('.model:last-child .token').nth(5).wait_for()
    page.keyboard.press('Escape')                             # reaches the engine
    rest(page)
    assert 'stopped' in page.locator('.facts').last.inner_text()
    for _ in range(100):
        if gauge(real, 'open_texts') == gauge(real, 'running') == 0: break
        page.wait_for_timeout(50)
    assert gauge(real, 'pages_free') == gauge(real, 'pages') and own(complaints) == []
    page.locator('#clear').click()
    page.locator('#message').fill('Once')
    page.keyboard.press('Enter')
    page.locator('.token').nth(5).wait_for()
    real.kill()                                               # and a server that goes away is told of
    rest(page)
    assert last_fault(page) == 'The connection to the server ended in the middle of the answer.'
