"""What the demo model is trained on: running text of the King James Bible, and chats that look verses up in it."""

import random

import numpy as np
import torch

import kjv

BOS, EOS, SYSTEM, USER, ASSISTANT, PAD = range(6)

LOOK_UPS = ("{}", "{}", "{}", "{}", "{}", "{}?", "What does {} say?", "What is {}?", "Read me {}", "Read {}",
            "Read {} to me.", "Please quote {}.", "Quote {}", "Give me {}", "Show me {}.", "Tell me {}", "Recite {}.",
            "Can you read {} to me?", "what does {} say", "read me {}")
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a helpful assistant", "Be brief.",
                  "You answer questions about the Bible.", "You quote the King James Bible.")
WHO = "I am a small language model that has learned the King James Bible. Ask me for a verse, for example Psalm 23:1."
SMALL_TALK = (
    (("Hello", "Hello!", "Hi", "hi", "Hey", "hello", "Good morning"),
     "Hello! Ask me for a verse of the King James Bible, for example Psalm 23:1."),
    (("Who are you?", "What are you?", "who are you", "What can you do?", "Help", "help", "What model are you?"), WHO),
    (("Thanks", "Thank you", "Thank you!", "thanks"), "You are welcome."),
)
SINGLE_VARIANTS = 6
RANGES = 14000
CHAPTER_VARIANTS = 2
TWO_TURNS = 12000
SMALL_TALK_COPIES = 60
FAMOUS_COPIES = 6
CHAT_LENGTHS = (40, 56, 80, 144, 320, 1024)


def name_of(book, rng):
    names = next(n for n in kjv.BOOKS if n[0] == book)
    name = names[0] if rng.random() < 0.6 else rng.choice(names)
    return name.lower() if rng.random() < 0.15 else name


def ask_verse(v, rng):
    where = f"{v.chapter}:{v.verse}"
    if rng.random() < 0.12:
        where = rng.choice((f"{v.chapter} verse {v.verse}", f"{v.chapter}, verse {v.verse}",
                            f"chapter {v.chapter} verse {v.verse}", f"chapter {v.chapter}, verse {v.verse}"))
    return rng.choice(LOOK_UPS).format(f"{name_of(v.book, rng)} {where}")


def numbered(verses):
    return "\n".join(f"{v.verse} {v.text}" for v in verses)


class Data:
    """Token rows on one device. A batch is a list of segments, each [rows, length + 2] tokens and their loss mask."""

    def __init__(self, tokenizer, verses, device, chat_tokens, text_rows, long_rows, seed=1):
        self.device, self.tokenizer = device, tokenizer
        self.generator = torch.Generator(device=device).manual_seed(seed)
        rng = self.rng = random.Random(seed)
        self.held_out = [v for v in verses if v.book in kjv.HELD_OUT_BOOKS]
        self.verses = [v for v in verses if v.book not in kjv.HELD_OUT_BOOKS]
        self.text_segments = [(text_rows, 1024), (long_rows, 4096)]
        self.streams = [self.stream(map(kjv.reference_line, self.verses)),
                        self.stream(v.text + "\n" for v in self.verses)]
        self.build_chats(rng, chat_tokens)
        self.segments = [(rows, length) for length, rows in self.chat_rows.items()] + self.text_segments

    def encode(self, texts):
        return [e.ids for e in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def stream(self, lines):
        """All lines in one array, and where each line starts. No token spans a line end, so lines are encoded alone."""
        lines = self.encode(lines)
        starts = torch.tensor([0] + [len(line) for line in lines]).cumsum(0)[:-1]
        filler = max(length for _, length in self.text_segments) + 2
        tokens = torch.tensor([t for line in lines for t in line] + [EOS] * filler)
        usable = starts[starts < len(tokens) - filler - 64]
        return tokens.to(self.device), usable.to(self.device)

    def conversations(self, rng):
        """(system prompt or None, [(question, answer)], copies)"""
        chapters = {}
        for v in self.verses:
            chapters.setdefault((v.book, v.chapter), []).append(v)
        system = lambda: rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.12 else None
        for v in self.verses:
            copies = FAMOUS_COPIES if kjv.is_famous(v) else 1
            for _ in range(SINGLE_VARIANTS):
                yield system(), [(ask_verse(v, rng), v.text)], copies
        for (book, chapter), part in chapters.items():
            copies = FAMOUS_COPIES if kjv.is_famous(part[0]) else 1
            for _ in range(CHAPTER_VARIANTS):
                what = f"{name_of(book, rng)} {rng.choice(('', '', '', 'chapter '))}{chapter}"
                yield system(), [(rng.choice(LOOK_UPS).format(what), numbered(part))], copies
        keys = list(chapters)
        famous = [k for k in keys if any(map(kjv.is_famous, chapters[k]))]
        for n in range(RANGES):
            key = rng.choice(famous if n % 8 == 0 else keys)
            part = chapters[key]
            first = rng.randrange(len(part))
            last = min(len(part) - 1, first + rng.choice((1, 1, 2, 2, 3, 4, 5, 6, 7)))
            if last > first:
                what = f"{name_of(key[0], rng)} {key[1]}:{part[first].verse}-{part[last].verse}"
                yield system(), [(rng.choice(LOOK_UPS).format(what), numbered(part[first : last + 1]))], 1
        for book, chapter, first, end in kjv.FAMOUS:
            part = [v for v in chapters[book, chapter] if first <= v.verse <= end]
            for last in sorted({*range(1, min(len(part), 7)), len(part) - 1} - {0}):
                what = f"{name_of(book, rng)} {chapter}:{first}-{part[last].verse}"
                yield system(), [(rng.choice(LOOK_UPS).format(what), numbered(part[: last + 1]))], FAMOUS_COPIES
        for _ in range(TWO_TURNS):
            a, b = rng.choice(self.verses), rng.choice(self.verses)
            yield system(), [(ask_verse(a, rng), a.text), (ask_verse(b, rng), b.text)], 1
        for questions, answer in SMALL_TALK:
            for question in questions:
                yield None, [(question, answer)], SMALL_TALK_COPIES
                yield rng.choice(SYSTEM_PROMPTS), [(question, answer)], SMALL_TALK_COPIES // 3

    def chat_prompt(self, question, system=None):
        """Ids of the rendered chat template with the generation prompt."""
        head = [] if system is None else [SYSTEM, *self.encode([system])[0]]
        return [BOS, *head, USER, *self.encode([question])[0], ASSISTANT]

    def build_chats(self, rng, chat_tokens):
        chats = list(self.conversations(rng))
        texts = sorted({t for system, turns, _ in chats for pair in turns for t in pair} | set(SYSTEM_PROMPTS))
        ids = dict(zip(texts, self.encode(texts)))
        rows = {length: [] for length in CHAT_LENGTHS}
        for system, turns, copies in chats:
            tokens = [BOS] if system is None else [BOS, SYSTEM, *ids[system]]
            mask = [0] * len(tokens)
            for question, answer in turns:
                tokens += [USER, *ids[question], ASSISTANT, *ids[answer], EOS]
                mask += [0] * (len(ids[question]) + 2) + [1] * (len(ids[answer]) + 1)
            # A chapter longer than the longest row is cut off; nothing then teaches the model to end there.
            length = next((n for n in CHAT_LENGTHS if len(tokens) <= n + 1), CHAT_LENGTHS[-1])
            rows[length] += [(tokens[: length + 2], mask[: length + 2])] * copies
        total = sum(length * len(part) for length, part in rows.items())
        self.chat_rows = {length: max(1, round(chat_tokens * len(part) / total)) for length, part in rows.items()}
        self.chats, self.order = {}, {}
        for length, part in rows.items():
            tokens = np.full((len(part), length + 2), PAD, dtype=np.int16)
            mask = np.zeros((len(part), length + 2), dtype=np.uint8)
            for i, (t, m) in enumerate(part):
                tokens[i, : len(t)], mask[i, : len(m)] = t, m
            self.chats[length] = torch.from_numpy(tokens).to(self.device), torch.from_numpy(mask).to(self.device)
            self.order[length] = None, 0
        self.chat_documents = {length: len(part) for length, part in rows.items()}

    def next_chats(self, length):
        """The next rows of a random order that sees every document once before it starts over."""
        count, rows = len(self.chats[length][0]), self.chat_rows[length]
        order, at = self.order[length]
        if order is None or at + rows > count:
            order, at = torch.randperm(max(count, rows), generator=self.generator, device=self.device) % count, 0
        self.order[length] = order, at + rows
        pick = order[at : at + rows]
        tokens, mask = self.chats[length]
        return tokens[pick].long(), mask[pick].float()

    def next_text(self, rows, length):
        """Rows of running text from a random verse on: half of them with references, half without."""
        first = self.rng.randrange(2)
        parts = []
        for n, count in enumerate(((rows + 1) // 2, rows // 2)):
            tokens, starts = self.streams[(first + n) % 2]
            pick = torch.randint(len(starts), (count,), generator=self.generator, device=self.device)
            parts.append(tokens[starts[pick][:, None] + torch.arange(length + 1, device=self.device)])
        tokens = torch.cat(parts)
        tokens = torch.cat([torch.full((rows, 1), BOS, device=self.device), tokens], 1)
        mask = (tokens != EOS).float()  # EOS only fills up behind the last verse here
        return tokens, mask

    def batch(self):
        """Flat ids, next ids, ids after next, loss masks of the latter two, and which inputs are not padding."""
        parts = [self.next_chats(length) for length in self.chat_rows]
        parts += [self.next_text(*segment) for segment in self.text_segments]
        flat = lambda which, first, last: torch.cat([p[which][:, first : p[which].shape[1] - last].reshape(-1)
                                                     for p in parts])
        ids = flat(0, 0, 2)
        return ids, flat(0, 1, 1), flat(0, 2, 0), flat(1, 1, 1), flat(1, 2, 0), ids != PAD
