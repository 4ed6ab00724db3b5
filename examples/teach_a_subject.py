"""Teach Stable Diffusion or SDXL a subject; see what the model learned and what it still knows.

`photos` is a folder with pictures of the subject, `knowledge.txt` has a prompt a line of what must stay. python
examples/teach_a_subject.py --instance_data_dir photos --knowledge_prompts knowledge.txt
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoPipelineForText2Image
from tqdm.auto import trange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from diffusers_ext import add_null_space_lora, collect_statistics, evaluate_forgetting, save_lora
from diffusers_ext.core.seeds import training_schedule
from diffusers_ext.nullspace.prompts import read_prompts_file
from diffusers_ext.nullspace.step import DreamBoothLoss
from diffusers_ext.training.nullspace.data import encode_condition, encode_images, list_images
from examples.arguments import DEVICE, DTYPE, read_arguments


def main(input_args: list[str] | None = None) -> None:
    """Write a LoRA, the statistics it was trained under, and pictures without and with it."""
    args = read_arguments(
        __doc__, input_args, model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        instance_data_dir=str, knowledge_prompts=str, instance_prompt="a photo of sks dog",
        max_train_steps=600, train_batch_size=4, learning_rate=3e-2, guidance_scale=7.5,
        num_inference_steps=50, output_dir="outputs/subject",
    )  # fmt: skip
    pipe = AutoPipelineForText2Image.from_pretrained(args.model, dtype=DTYPE).to(DEVICE)
    unet, subject = pipe.unet.requires_grad_(False), [args.instance_prompt]
    knowledge = read_prompts_file(args.knowledge_prompts)
    statistics = collect_statistics(pipe, knowledge)  # of their text embeddings
    add_null_space_lora(unet, statistics, instance_prompts=subject, pipeline=pipe, rank=1)
    size = unet.config.sample_size * pipe.vae_scale_factor
    pictures = list_images(args.instance_data_dir)
    latents = encode_images(pipe, pictures, size, center_crop=True, flip=False)
    condition = encode_condition(pipe, args.instance_prompt)
    loss = DreamBoothLoss(training_schedule(pipe.scheduler), condition)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, weight_decay=0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.max_train_steps)
    generator = torch.Generator().manual_seed(0)
    for _ in trange(args.max_train_steps):
        rows = torch.randint(len(latents), (args.train_batch_size,), generator=generator)
        loss(unet, latents[rows], generator)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    save_lora(type(pipe), unet, args.output_dir)  # for `pipe.load_lora_weights`
    statistics.save_pretrained(f"{args.output_dir}/statistics")
    run = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale")}
    report = evaluate_forgetting(pipe, None, knowledge[:4], subject_prompts=subject, **run)
    report.picture_sheet(f"{args.output_dir}/sheet.png")


if __name__ == "__main__":
    main()
