"""Prompts of mixed length for the exactness tests, as token ids; the same in every run."""

import random


def make_prompts(count=100, vocab=4000, longest=300, seed=20):
    generator = random.Random(seed)
    prompts = []
    shared = [generator.randrange(300, vocab) for _ in range(longest)]
    for index in range(count):
        length = generator.choice([1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 65]) if index % 2 else generator.randrange(1, longest)
        if index % 5 == 0:  # shares a prefix with others
            tail = [generator.randrange(300, vocab) for _ in range(generator.randrange(1, 20))]
            prompts.append((shared[:length] + tail)[:longest])
        else:
            prompts.append([generator.randrange(300, vocab) for _ in range(length)])
    return prompts
