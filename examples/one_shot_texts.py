"""Texts for one_shot.py: books that Debian ships, where they are, or the documentation that Python ships."""

import gzip
import html
import re
from pathlib import Path

BOOKS = ("debian-handbook/html/en-US/*.html", "anarchism/html/**/*.html", "jargon-text/jargon.txt.gz")
DOCUMENTATION = Path("/usr/share/doc")


def load_texts(folder: Path | None) -> tuple[list[str], list[str], str]:
    """Return chapters to calibrate with and others to judge by, and what they are of.

    Args:
        folder: where books are to be found; None for where Debian installs them, or else Python's documentation.
    """
    place = DOCUMENTATION if folder is None else folder
    books = [sorted(place.glob(book)) or sorted(place.glob(f"usr/share/doc/{book}")) for book in BOOKS]
    if all(books):
        return (*_split([[_prose(file) for file in book] for book in books]), "three books of Debian")
    if folder is not None:
        raise SystemExit(
            f"{folder} has not all of {', '.join(book.split('/')[0] for book in BOOKS)}; in an empty folder: apt-get "
            "download debian-handbook anarchism jargon-text; for file in *.deb; do dpkg -x $file .; done"
        )
    from pydoc_data.topics import topics

    chapters = [_paragraphs(text.split("\n\n")) for _, text in sorted(topics.items())]
    return (*_split([chapters], shortest=1000), "Python's documentation")


def _split(books: list[list[str]], shortest: int = 3000) -> tuple[list[str], list[str]]:
    """Give every fourth chapter of each book, and the last third of one in a single file, to judge by."""
    calibration, held_out = [], []
    for chapters in books:
        if len(chapters) == 1:
            paragraphs = chapters[0].split("\n\n")
            part = len(paragraphs) * 2 // 3
            calibration.append("\n\n".join(paragraphs[:part]))
            held_out.append("\n\n".join(paragraphs[part:]))
        else:
            for number, text in enumerate(chapters):
                if len(text) >= shortest:
                    (held_out if number % 4 == 3 else calibration).append(text)
    return calibration, held_out


def _prose(path: Path) -> str:
    raw = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode(errors="ignore")
    if path.suffix != ".html":
        return _paragraphs(raw.split("\n\n"))
    found = re.findall(r"<p\b[^>]*>(.*?)</p>", raw, re.DOTALL | re.IGNORECASE)
    return _paragraphs([html.unescape(re.sub(r"<[^>]+>", "", text)) for text in found])


def _paragraphs(texts: list[str]) -> str:
    """Join paragraphs of some length that are mostly words."""
    lines = [" ".join(text.split()) for text in texts]
    return "\n\n".join(
        line for line in lines if len(line) > 120 and sum(c.isalpha() or c == " " for c in line) > 0.9 * len(line)
    )
