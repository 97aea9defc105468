"What several test modules use: work that is done once per session, and the words of a PDF."
import asyncio, os, shutil
from concurrent.futures import ThreadPoolExecutor

from filelock import FileLock


def once(factory, name, make):
    """The folder that `make(folder)` fills, once per session: the first process that asks fills it, the others wait and read.

    Who changes what lies in it works on a copy. A `make` that raises is asked again by the next one, and raises there too.
    """
    root = factory.getbasetemp().parent if 'PYTEST_XDIST_WORKER' in os.environ else factory.getbasetemp()
    folder, done = root/name, root/f'{name}.done'
    with FileLock(root/f'{name}.lock'):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def pdf_words(path):
    "The words of a PDF, with one blank between them."
    import pypdfium2
    pdf = pypdfium2.PdfDocument(path)
    try: return ' '.join(' '.join(page.get_textpage().get_text_range() for page in pdf).split())
    finally: pdf.close()


def in_a_loop(work):
    "What `work` gives in an event loop of its own, in another thread: this one may have a loop already, that of a browser."
    with ThreadPoolExecutor(1) as pool: return pool.submit(asyncio.run, work).result()
