"""The King James Bible (translation of 1611, public domain) as Debian's package bible-kjv carries it, by verse."""

import collections
import pathlib
import re
import subprocess

Verse = collections.namedtuple("Verse", "book chapter verse text")

# In the order of the text: the first name is the one the model uses, the others are what people also type.
BOOKS = [line.split("|") for line in """\
Genesis|Gen
Exodus|Ex|Exod
Leviticus|Lev
Numbers|Num
Deuteronomy|Deut
Joshua|Josh
Judges|Judg
Ruth
1 Samuel|1 Sam|First Samuel|I Samuel
2 Samuel|2 Sam|Second Samuel|II Samuel
1 Kings|1 Kgs|First Kings|I Kings
2 Kings|2 Kgs|Second Kings|II Kings
1 Chronicles|1 Chr|1 Chron|First Chronicles
2 Chronicles|2 Chr|2 Chron|Second Chronicles
Ezra
Nehemiah|Neh
Esther|Esth
Job
Psalm|Psalms|Ps|Psa|Psalms
Proverbs|Prov|Proverb
Ecclesiastes|Eccl|Ecc
Song of Solomon|Song of Songs|Song
Isaiah|Isa
Jeremiah|Jer
Lamentations|Lam
Ezekiel|Ezek
Daniel|Dan
Hosea|Hos
Joel
Amos
Obadiah|Obad
Jonah|Jon
Micah|Mic
Nahum|Nah
Habakkuk|Hab
Zephaniah|Zeph
Haggai|Hag
Zechariah|Zech
Malachi|Mal
Matthew|Matt|Mt
Mark|Mk
Luke|Lk
John|Jn
Acts|Acts of the Apostles
Romans|Rom
1 Corinthians|1 Cor|First Corinthians|I Corinthians
2 Corinthians|2 Cor|Second Corinthians|II Corinthians
Galatians|Gal
Ephesians|Eph
Philippians|Phil
Colossians|Col
1 Thessalonians|1 Thess|First Thessalonians
2 Thessalonians|2 Thess|Second Thessalonians
1 Timothy|1 Tim|First Timothy
2 Timothy|2 Tim|Second Timothy
Titus|Tit
Philemon|Philem
Hebrews|Heb
James|Jas
1 Peter|1 Pet|First Peter
2 Peter|2 Pet|Second Peter
1 John|1 Jn|First John
2 John|2 Jn|Second John
3 John|3 Jn|Third John
Jude
Revelation|Rev|Revelations""".splitlines()]
NAMES = [names[0] for names in BOOKS]

# Kept out of everything the model is trained on, to measure it on text it has not seen.
HELD_OUT_BOOKS = ("Obadiah", "3 John")

# What people ask for first; trained on more often. (book, chapter, first verse, last verse)
FAMOUS = [
    ("Genesis", 1, 1, 31), ("Exodus", 20, 1, 17), ("Numbers", 6, 24, 26), ("Deuteronomy", 6, 4, 9), ("Joshua", 1, 9, 9),
    ("Psalm", 1, 1, 6), ("Psalm", 8, 1, 9), ("Psalm", 19, 1, 14), ("Psalm", 23, 1, 6), ("Psalm", 27, 1, 4),
    ("Psalm", 46, 1, 11), ("Psalm", 51, 1, 12), ("Psalm", 90, 1, 17), ("Psalm", 91, 1, 16), ("Psalm", 100, 1, 5),
    ("Psalm", 103, 1, 22), ("Psalm", 117, 1, 2), ("Psalm", 119, 105, 105), ("Psalm", 121, 1, 8), ("Psalm", 139, 1, 24),
    ("Psalm", 150, 1, 6), ("Proverbs", 3, 5, 6), ("Proverbs", 31, 10, 31), ("Ecclesiastes", 1, 1, 11),
    ("Ecclesiastes", 3, 1, 8), ("Isaiah", 9, 6, 7), ("Isaiah", 40, 28, 31), ("Isaiah", 53, 3, 7),
    ("Jeremiah", 29, 11, 13), ("Micah", 6, 8, 8), ("Matthew", 5, 3, 16), ("Matthew", 6, 9, 13), ("Matthew", 6, 33, 34),
    ("Matthew", 7, 7, 12), ("Matthew", 11, 28, 30), ("Matthew", 28, 18, 20), ("Mark", 16, 15, 16), ("Luke", 2, 1, 20),
    ("John", 1, 1, 14), ("John", 3, 16, 17), ("John", 8, 12, 12), ("John", 8, 32, 32), ("John", 11, 25, 35),
    ("John", 13, 34, 35), ("John", 14, 1, 6), ("John", 15, 5, 13), ("Acts", 1, 8, 8), ("Acts", 2, 38, 38),
    ("Romans", 3, 23, 23), ("Romans", 5, 8, 8), ("Romans", 6, 23, 23), ("Romans", 8, 28, 39), ("Romans", 10, 9, 10),
    ("Romans", 12, 1, 2), ("1 Corinthians", 13, 1, 13), ("2 Corinthians", 5, 17, 17), ("Galatians", 2, 20, 20),
    ("Galatians", 5, 22, 23), ("Ephesians", 2, 8, 9), ("Ephesians", 6, 10, 17), ("Philippians", 4, 4, 13),
    ("1 Thessalonians", 5, 16, 18), ("2 Timothy", 1, 7, 7), ("2 Timothy", 3, 16, 17), ("Hebrews", 11, 1, 3),
    ("Hebrews", 12, 1, 2), ("Hebrews", 13, 8, 8), ("James", 1, 2, 5), ("1 Peter", 5, 7, 7), ("1 John", 1, 9, 9),
    ("1 John", 4, 7, 8), ("Revelation", 3, 20, 20), ("Revelation", 21, 1, 4), ("Revelation", 22, 20, 21),
]


def read_verses(path=None):
    """All 31,102 verses. `path`: the output of `bible -f gen1:1-rev22:21`; without it that program is run."""
    if path is None:
        text = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], check=True, capture_output=True, text=True).stdout
    else:
        text = pathlib.Path(path).read_text()
    verses, short_names = [], []
    for line in text.splitlines():
        match = re.fullmatch(r"([1-3]?[A-Za-z]+?)(\d+):(\d+) (.*)", line)
        if match is None:
            raise SystemExit(f"not a verse: {line!r}")
        if match[1] not in short_names:
            short_names.append(match[1])
        name = NAMES[short_names.index(match[1])]
        verses.append(Verse(name, int(match[2]), int(match[3]), match[4].strip()))
    if len(verses) != 31102 or len(short_names) != len(NAMES):
        raise SystemExit(f"expected 31102 verses in 66 books, got {len(verses)} in {len(short_names)}")
    return verses


def is_famous(v):
    return any(v.book == b and v.chapter == c and first <= v.verse <= last for b, c, first, last in FAMOUS)


def reference_line(v):
    return f"{v.book} {v.chapter}:{v.verse} {v.text}\n"
