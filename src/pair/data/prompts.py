"""Sentences about classes: the text side of the small CLIP and of the embedded benchmark.

Training and evaluation use different templates, so no query was ever seen in training.
"""

TRAIN_TEMPLATES = (
    "a photo of a {}",
    "a picture of the {}",
    "{}",
    "an image showing a {}",
    "a {} in a photograph",
    "a close up photo of a {}",
    "one {}",
    "a good photo of the {}",
    "this is a {}",
    "a drawing or photo of a {}",
)
HELD_OUT_TEMPLATES = (
    "there is a {} in this image",
    "a photograph of one {}",
    "the picture shows the {}",
    "a small photo showing a {}",
    "look at this {}",
)
# Words of the held-out templates that no training template has; kept out of the vocabulary they
# become unknown words, as any word of a real user may be.


def sentences(names: list[str], templates: tuple[str, ...]) -> list[str]:
    """Every class through every template, class by class."""
    return [t.format(n) for n in names for t in templates]
