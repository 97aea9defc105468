"""The drawing helpers of the figures appendix."""
import json, re

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from llm_from_scratch.figures import COLORS, SVG, HeadView, head_view, heatmap, pipeline, use_style

INPUTS = []


@pytest.fixture(autouse=True)
def own_settings():
    "Each test starts from matplotlib's settings and gives them back."
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        plt.switch_backend('agg')
        yield
        plt.close('all')


def saved(path):
    "A small figure as the bytes of its file."
    fig, ax = plt.subplots()
    ax.plot([1, 2, 3])
    fig.savefig(path, format='svg', metadata={'Date': None})
    return path.read_bytes()


def test_the_style_paints_no_ground_and_uses_the_colors(tmp_path):
    use_style()
    picture = saved(tmp_path/'a.svg').decode()
    assert COLORS[0].lower() in picture.lower()
    assert matplotlib.rcParams['axes.prop_cycle'].by_key()['color'] == list(COLORS)
    assert 'style="fill: #ffffff' not in picture and 'fill: none' in picture


def test_the_same_figure_is_the_same_file(tmp_path):
    use_style()
    assert saved(tmp_path/'a.svg') == saved(tmp_path/'b.svg')


def test_an_svg_shows_itself():
    assert SVG('<svg/>')._repr_svg_() == '<svg/>'


def test_a_heatmap_names_its_axes_and_writes_its_numbers():
    _, ax = plt.subplots()
    heatmap(ax, [[1, 2], [3, 4]], rows=['a', 'b'], columns=['c', 'd'], xlabel='x', ylabel='y', fmt='.0f')
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('x', 'y')
    assert [t.get_text() for t in ax.get_xticklabels()] == ['c', 'd'] and [t.get_text() for t in ax.get_yticklabels()] == ['a', 'b']
    assert [t.get_text() for t in ax.texts] == ['1', '2', '3', '4']


def test_a_heatmap_refuses_what_is_no_matrix():
    _, ax = plt.subplots()
    with pytest.raises(ValueError, match=r'shape \(3,\)'): heatmap(ax, [1, 2, 3])


@settings(max_examples=20)
@given(st.lists(st.text(max_size=6), min_size=1, max_size=6), st.integers(1, 3))
def test_any_tokens_make_a_page(tokens, H):
    weights = np.random.default_rng(len(tokens)).random((H, len(tokens), len(tokens)))
    page = head_view(tokens, weights, [f'<h{i}>&"' for i in range(H)])
    body = re.sub(r'<(style|script)[^>]*>.*?</\1>', '', page, flags=re.S)
    assert isinstance(page, HeadView) and page.count('<script') == page.count('</script') == 2 and '<h0>' not in page
    assert body.count('<svg') == H and 'hidden' in body
    data = json.loads(re.search(r'application/json">(.*?)</script>', page, re.S)[1])
    assert len(data['tokens']) == len(tokens) and data['names'] == [f'<h{i}>&"' for i in range(H)]
    assert data['weights'] == (weights * 1000).round().astype(int).tolist()


def test_a_view_is_the_same_each_time_and_says_what_is_wrong():
    assert head_view('abc', np.eye(3)[None]) == head_view('abc', np.eye(3)[None]) != head_view('abd', np.eye(3)[None])
    with pytest.raises(ValueError, match='2 tokens'): head_view('ab', np.eye(3)[None])
    with pytest.raises(ValueError, match='1 names'): head_view('abc', [np.eye(3)] * 2, ['one'])


def test_a_view_takes_lists_arrays_and_tensors_of_any_kind():
    torch = pytest.importorskip('torch')
    weights = [[[1, 0], [.25, .75]]]
    tensor = torch.tensor(weights, requires_grad=True)
    assert head_view('ab', weights) == head_view('ab', np.array(weights, 'float32')) == head_view('ab', tensor) == head_view('ab', tensor.bfloat16())


@pytest.mark.parametrize('lit', [(), ('text',), ('tokens', 'ids'), ('next token',), ('loss',), ('loss', 'update')])
def test_a_strip_says_what_it_lights_and_shows_training_where_it_is_the_subject(lit):
    strip, large = pipeline(*lit), pipeline(*[name for name in lit if name not in ('loss', 'update')], values={'text': 'Once'})
    title = re.search('<title>(.*?)</title>', strip)[1]
    assert title.endswith(f"Lit: {' and '.join(lit) or 'nothing'}.") and '<title>' not in large and 'Once' in large
    assert strip.count('fill="#fbe3d3"') == len(lit) + bool(lit)                # a mark at the bottom says what the color means
    assert ('gradient' in strip) == ('gradient' in title) == bool({'loss', 'update'} & {*lit})
    wide, tall = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', strip).groups())
    assert wide <= 372 and tall <= 150
    for x, y, width, height in re.findall(r'<rect x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)"', strip):
        assert int(x) + int(width) <= wide and int(y) + int(height) <= tall


def test_the_pipeline_with_an_example_knows_no_training():
    with pytest.raises(ValueError, match="no stage is called 'loss'"): pipeline('loss', values={'ids': '3'})
    with pytest.raises(ValueError, match="no stage is called 'lossy'.*update"): pipeline('lossy')
