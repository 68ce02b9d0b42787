"""The movie sentences of vaderSentiment 0.5 as a CSV file that `--data csv:` reads.

    pip download --no-deps --no-binary :all: vaderSentiment==0.5
    python benchmarks/accuracy/sentences.py vaderSentiment-0.5.zip sentences.csv

Sentences of film reviews (Rotten Tomatoes), each rated by twenty people from -4 to 4 (Hutto and
Gilbert, ICWSM 2014; the package's licence is MIT). The label is the sign; those rated within half
a point of 0 are left out. 80 % train, 10 % validation, 10 % test, by a hash of the sentence, so
that a sentence that stands there twice is on one side.
"""

import argparse
import csv
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
_FILE = "movieReviewSnippets_GroundTruth.txt"
_NEUTRAL = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="vaderSentiment-0.5.zip")
    parser.add_argument("out", type=Path, help="the CSV file")
    options = parser.parse_args()
    rows = sentences(options.package)
    with options.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "split"))
        writer.writerows(rows)
    counts = {part: sum(row[2] == part for row in rows) for part in ("train", "validation", "test")}
    print(", ".join(f"{count} {part}" for part, count in counts.items()))


def sentences(package: Path) -> list[tuple[str, str, str]]:
    """(text, "positive" or "negative", split) of every sentence with a clear rating."""
    rows = []
    for line in _lines(package):
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) > _NEUTRAL:
            label = "positive" if float(rating) > 0 else "negative"
            rows.append((text.strip(), label, _split(text.strip())))
    return rows


def _lines(package: Path) -> list[str]:
    with zipfile.ZipFile(package) as files:
        (name,) = [name for name in files.namelist() if name.endswith(_ARCHIVE)]
        inner = io.BytesIO(files.read(name))
    with tarfile.open(fileobj=inner) as files:
        (member,) = [one for one in files.getmembers()
                     if one.isfile() and Path(one.name).name == _FILE]  # fmt: skip
        content = files.extractfile(member)
        assert content is not None, "a file has content"
        return content.read().decode().splitlines()


def _split(text: str) -> str:
    tenth = hashlib.sha256(text.encode()).digest()[0] * 10 // 256
    return {8: "validation", 9: "test"}.get(tenth, "train")


if __name__ == "__main__":
    main()
