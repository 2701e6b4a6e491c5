"""TTH's keyword rule, with every quirk, and the target embedding."""

import json
import os
from pathlib import Path

import pytest
import torch

from pair.attacks.keywords import (
    KEYWORDS,
    RELEASED_KEYWORDS,
    caption_matches,
    select_captions,
    target_embedding,
)

# Queries per keyword in the published result (Karpathy test split of Flickr30K, 1,754 in all).
PUBLISHED = {
    "blue": 329, "front": 264, "little": 186, "green": 175, "yellow": 161, "jacket": 93,
    "pink": 87, "dress": 66, "smiling": 56, "swimming": 46, "female": 46, "climbing": 44,
    "floor": 44, "reading": 38, "dancing": 30, "motorcycle": 21, "cow": 15, "run": 13,
    "policeman": 12, "floating": 10, "waiter": 5, "feeding": 5, "maroon": 5, "navy": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("caption", "keyword", "matches"),
    [
        ("A man in a green shirt", "green", True),  # " w "
        ("The wall is green.", "green", True),  # " w."
        ("Green fields at dawn", "green", True),  # "w " at the start, and lower case
        ("An evergreen tree", "green", True),  # "w " needs no space in front
        ("A green-eyed cat", "green", False),
        ("The shirt is green, the hat red", "green", False),  # "w,"
        ("The wall is green", "green", False),  # the last word without a full stop
        ("The wall is green!", "green", False),
        ("Greenish water", "green", False),
        ("evergreen.", "green", False),  # " w." needs the space
        ("Two cows on grass", "cow", True),  # " ws "
        ("He counts the cows.", "cow", True),  # " ws."
        ("Cows graze", "cow", True),  # "ws "
        ("Muscows sleep", "cow", True),  # "ws " needs no space in front either
        ("He counts the cows", "cow", False),
        ("Two policemen walk", "policeman", False),  # plural by "+s" only
        ("Three dresses hang here", "dress", False),
        ("A cowboy rides", "cow", False),
        ("A dog runs fast", "run", True),
        ("A dog is running", "run", False),
        ("A GREEN CAR", "green", True),
        ("", "green", False),
        ("green", "green", False),
        ("green ", "green", True),
    ],
)
def test_every_quirk_of_the_rule(caption, keyword, matches):
    assert caption_matches(caption, keyword) is matches


def test_the_keywords():
    assert len(KEYWORDS) == len(set(KEYWORDS)) == 24
    assert set(KEYWORDS) == set(PUBLISHED)
    assert len(RELEASED_KEYWORDS) == 23 and "blue" not in RELEASED_KEYWORDS
    assert sum(PUBLISHED.values()) == 1754


def test_500_captions_or_more_are_sampled_and_fewer_are_all_taken():
    few = [f"a blue thing {i} here" for i in range(499)] + ["a red thing"] * 50
    assert select_captions(few, "blue") == few[:499]
    many = [f"a blue thing {i} here" for i in range(800)]
    chosen = select_captions(many, "blue")
    assert len(chosen) == len(set(chosen)) == 500 and set(chosen) <= set(many)
    assert chosen == select_captions(many, "blue") != select_captions(many, "blue", seed=3)
    exact = many[:500]
    assert sorted(select_captions(exact, "blue")) == sorted(exact)


class Texts:
    """Features of different norms: the mean must be of the raw ones."""

    def encode_text(self, texts):
        return torch.tensor([[float(len(t)), 1.0] for t in texts])


def test_the_target_is_the_mean_of_raw_text_features():
    texts = ["ab", "abcd", "abcdefghi"]
    torch.testing.assert_close(target_embedding(Texts(), texts), torch.tensor([[5.0, 1.0]]))
    in_parts = target_embedding(Texts(), texts, batch=2)
    torch.testing.assert_close(in_parts, target_embedding(Texts(), texts))
    with pytest.raises(ValueError, match="at least one"):
        target_embedding(Texts(), [])


def karpathy() -> Path | None:
    places = [os.environ.get("PAIR_FLICKR30K"), "data/flickr30k"]
    for place in filter(None, places):
        file = Path(place)
        file = file / "dataset_flickr30k.json" if file.is_dir() else file
        if file.is_file():
            return file
    return None


@pytest.mark.skipif(
    karpathy() is None,
    reason="needs Karpathy's dataset_flickr30k.json: name it in PAIR_FLICKR30K",
)
def test_published_counts_of_flickr30k():
    images = json.loads(karpathy().read_text())["images"]
    captions = [s["raw"] for i in images if i["split"] == "test" for s in i["sentences"]]
    assert len(captions) == 5000
    counts = {w: sum(caption_matches(c, w) for c in captions) for w in KEYWORDS}
    assert counts == PUBLISHED
