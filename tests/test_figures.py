"""The drawing helpers of the figures appendix."""
import matplotlib
import pytest
from matplotlib import pyplot as plt

from llm_from_scratch.figures import COLORS, SVG, heatmap, use_style

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
