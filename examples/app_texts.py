"""What the app says about each tool, and prompts to try: on the bundled models and on others."""

from __future__ import annotations

from examples.app_artifacts import ERASED, GLYPH
from examples.digits.prompts import RARE_TOKENS

SUBJECT, NOISE, ERASER = "Taught subject", "Golden noise", "Erased concept"
TITLE = "Same prompt, same seed: without and with a tool"
EXPLANATIONS = {
    SUBJECT: "A null-space LoRA: a new subject, taught along directions that the model's "
    "knowledge does not use. Its prompt changes, all others stay.",
    NOISE: "A small network turns the seed's noise into noise that suits the prompt, before the first denoising step.",
    ERASER: "An eraser beside the attention of CogVideoX leads the prompts of one concept "
    "elsewhere and leaves all others where they were.",
}
BUNDLED_NOTES = {
    SUBJECT: f'The bundled model of handwritten digits learned "{RARE_TOKENS[0]}", a {GLYPH}.',
    NOISE: "The bundled model of handwritten digits, with only four denoising steps.",
    ERASER: f'The bundled model of moving digits, with "{ERASED}" erased.',
}
# Prompt and seed; the first is shown when a tool is chosen.
BUNDLED_PROMPTS = {
    SUBJECT: [
        (f"a photo of the digit {RARE_TOKENS[0]}", 1),
        ("a photo of the red digit seven", 1),
        ("the number four in green", 2),
    ],
    NOISE: [
        ("a drawing of a four in white", 3),
        ("a drawing of a six in red", 6),
        ("a drawing of a four in yellow", 11),
        ("a yellow two", 1),
    ],
    ERASER: [
        (f"a red {ERASED} moving right", 0),
        (f"in white a {ERASED} goes up", 1),
        ("a green five moving left", 2),
        ("the blue eight goes down", 3),
    ],
}
OTHER_PROMPTS = {
    SUBJECT: [("a photo of sks dog", 0), ("a photo of a cat on a sofa", 0)],
    NOISE: [("a red fox in the snow, oil painting", 0), ("a glass of tea by a window", 1)],
    ERASER: [("a dog runs along the beach", 0), ("a cat sleeps on a sofa", 0)],
}


def explain(tool: str, bundled: bool) -> str:
    """What a tool does, in Markdown."""
    return EXPLANATIONS[tool] + (f" *{BUNDLED_NOTES[tool]}*" if bundled else "")


def prompts_of(tool: str, bundled: bool) -> list[tuple[str, int]]:
    """Prompts and seeds to try with a tool."""
    return (BUNDLED_PROMPTS if bundled else OTHER_PROMPTS)[tool]
