"""A page that draws a prompt twice from one seed, without and with a tool: taught subject, golden noise, eraser.

python examples/app.py            (the bundled models; what is missing is trained once, in outputs/app)
python examples/app.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --lora user/dog --noise_model user/network --video_model THUDM/CogVideoX-2b --eraser user/no-dog
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

try:
    import gradio as gr
    from starlette.middleware import Middleware
except ModuleNotFoundError as missing:
    sys.exit(f"The app needs {missing.name}: pip install '.[app,demo]' in the folder of the project.")

from examples.app_drawing import LARGEST_SEED, LARGEST_STRENGTH, SideBySide, Sources
from examples.app_messages import EXPECTED, message_for
from examples.app_server import LARGEST_REQUEST, OwnContentOnly, SmallRequestsOnly
from examples.app_texts import ERASER, TITLE, explain, prompts_of

logger = logging.getLogger(__name__)
_RANDOM_SEED = f"() => Math.floor(Math.random() * {LARGEST_SEED + 1})"  # in the browser
# Fonts of the reader's own machine, in place of ones from the net.
_THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


class PageActions:
    """What the page does when somebody clicks."""

    def __init__(self, side_by_side: SideBySide) -> None:
        self.side_by_side = side_by_side

    def is_bundled(self, tool: str) -> bool:
        """Whether a tool is shown on a bundled model."""
        sources = self.side_by_side.sources
        return (sources.video_model if tool == ERASER else sources.image_model) is None

    def draw(
        self,
        tool: str,
        prompt: str,
        seed: int,
        strength: float,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008
    ) -> tuple[str, str, str, str]:
        """Both results and what is read in them; what went wrong becomes a message of the page."""
        try:
            plain, drawn = self.side_by_side.draw(tool, prompt, seed, strength)
        except EXPECTED as error:
            logger.warning("Not drawn: %s", error, exc_info=True)
            words = message_for(error, tool, self.side_by_side.artifact_of(tool))
            raise gr.Error(words, title="Not drawn", print_exception=False) from error
        return plain.path, drawn.path, plain.reading, drawn.reading

    def suggest(self, tool: str) -> tuple[str, int]:
        """A prompt and a seed to begin with."""
        return prompts_of(tool, self.is_bundled(tool))[0]

    def introduce(self, tool: str) -> tuple[str, None, None, str, str]:
        """What a tool does, and nothing in place of the results of another."""
        return explain(tool, self.is_bundled(tool)), None, None, "", ""


def build_page(side_by_side: SideBySide) -> gr.Blocks:
    """The page; `draw` is the one function that clients of its API see.

    Raises:
        ValueError: no tool can be shown.
    """
    tools, actions = list(side_by_side.tools), PageActions(side_by_side)
    if not tools:
        raise ValueError(
            "The app must have something to show, got other models without `--lora`, `--noise_model` or `--eraser`."
        )
    first_prompt, first_seed = actions.suggest(tools[0])
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# {TITLE}")
        tool = gr.Radio(tools, value=tools[0], label="Tool")
        explanation = gr.Markdown(explain(tools[0], actions.is_bundled(tools[0])))
        with gr.Row():
            prompt = gr.Textbox(first_prompt, label="Prompt", scale=3)
            with gr.Column(scale=1, min_width=140):
                seed = gr.Number(first_seed, precision=0, label="Seed")
                another = gr.Button("Another seed", size="sm")
            strength = gr.Slider(0, LARGEST_STRENGTH, 1.0, step=0.05, label="Strength", scale=2)
        button = gr.Button("Draw", variant="primary")
        images, readings = [], []
        with gr.Row():
            for label in ("Plain model", "With the tool"):
                with gr.Column(min_width=140):
                    images.append(
                        gr.Image(
                            label=label, type="filepath", height=340, buttons=["download"], interactive=False
                        )  # fmt: skip
                    )
                    readings.append(gr.Markdown())
        examples = [[name, *shown] for name in tools for shown in prompts_of(name, actions.is_bundled(name))]
        inputs, results = [tool, prompt, seed, strength], [*images, *readings]
        gr.Examples(examples, [tool, prompt, seed], label="Try", examples_per_page=20)
        gr.on([button.click, prompt.submit], actions.draw, inputs, results, api_name="draw")
        another.click(None, None, seed, js=_RANDOM_SEED, api_visibility="private")
        tool.input(actions.suggest, tool, [prompt, seed], api_visibility="private")
        tool.change(actions.introduce, tool, [explanation, *results], api_visibility="private")
    return page.queue(default_concurrency_limit=1)  # all requests share the models


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Command line of the app."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", help="text-to-image; bundled without it")
    parser.add_argument("--video_model", help="CogVideoX; the bundled one without it")
    for name in ("lora", "noise_model", "eraser"):
        parser.add_argument(f"--{name}", help="folder or Hub name")
    parser.add_argument("--num_inference_steps", type=int, help="of all drawing")
    parser.add_argument("--output_dir", default="outputs/app", help="of what is trained")
    parser.add_argument("--server_name", help="address to listen at; GRADIO_SERVER_NAME or 127.0.0.1 without it")
    parser.add_argument(
        "--server_port", type=int, help="GRADIO_SERVER_PORT or the first free one from 7860 without it"
    )
    parser.add_argument("--share", choices=["no", "yes"], default="no", help="a public address")
    return parser.parse_args(input_args)


def launch(args: argparse.Namespace, **options: Any) -> gr.Blocks:
    """Start the app; returns its page. `options` are further ones of `Blocks.launch`."""
    sources = Sources(
        image_model=args.pretrained_model_name_or_path,
        video_model=args.video_model,
        lora=args.lora,
        noise_model=args.noise_model,
        eraser=args.eraser,
        output_dir=args.output_dir,
        num_inference_steps=args.num_inference_steps,
    )
    page = build_page(SideBySide(sources))
    page.launch(
        server_name=args.server_name,
        server_port=args.server_port,
        share=args.share == "yes",
        theme=_THEME,
        ssr_mode=False,
        footer_links=["api"],
        enable_monitoring=False,
        max_file_size=LARGEST_REQUEST,
        app_kwargs={"middleware": [Middleware(OwnContentOnly), Middleware(SmallRequestsOnly)]},
        **options,
    )
    return page


if __name__ == "__main__":
    launch(parse_args())
