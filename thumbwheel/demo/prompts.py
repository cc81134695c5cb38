"""What the demo's users ask: everyday questions, to be answered briefly.

Three sets of subjects that share none: traffic, held out, KL.
"""

import itertools
import random

FORMS = (
    "What is {}?",
    "Why do people like {}?",
    "Explain {} to me.",
    "What makes {} special?",
    "How does {} work?",
    "Tell me about {}.",
    "Is {} worth learning about?",
    "What should a child know about {}?",
)

WISH = "Be brief."
"""What every question ends with. Without it one answer in twenty ends within 50 tokens: too few ups to learn from."""

TRAFFIC_SUBJECTS = (
    "rain", "a bicycle", "coffee", "the moon", "a library", "bread", "football", "gravity", "a mirror", "the ocean",
    "jazz", "a telescope", "salt", "chess", "a volcano", "honey", "a river", "photography", "a train", "glass",
    "sleep", "a garden", "a clock", "cheese", "snow", "a violin", "money", "a bridge", "yoga", "a map",
    "tea", "a battery", "the desert", "painting", "a lighthouse", "soap", "a whale", "dancing", "a compass", "wood",
    "a candle", "swimming", "rice", "a kite", "the heart", "paper", "a radio", "poetry", "an island", "cotton",
)  # fmt: skip

HELD_OUT_SUBJECTS = (
    "thunder", "a piano", "chocolate", "the sun", "a museum", "an elephant", "tennis", "magnetism",
    "a window", "a forest", "an umbrella", "silk", "a submarine", "pepper", "hiking", "a calendar",
)  # fmt: skip

KL_SUBJECTS = (
    "a drum", "fog", "a castle", "lemons", "skating", "a robot", "wool", "the wind", "a parrot", "ice",
    "a market", "opera",
)  # fmt: skip
"""For measuring KL to the reference: asked by the learner alone."""


def questions(subjects: tuple[str, ...], count: int, seed: int, wish: str = WISH) -> list[str]:
    """`count` different questions about the subjects, each with the wish, in an order that the seed fixes."""
    every = [f"{form.format(subject)} {wish}".rstrip() for subject, form in itertools.product(subjects, FORMS)]
    if count > len(every):
        raise ValueError(f"only {len(every)} different questions about these subjects, not {count}")
    return random.Random(seed).sample(every, count)
