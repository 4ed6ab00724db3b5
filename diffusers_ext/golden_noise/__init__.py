"""Noise that suits the prompt: targets, networks that predict them, pipelines that use them."""

from diffusers_ext.golden_noise.conditioning import TextConditioning, encode_prompts
from diffusers_ext.golden_noise.loading import load_noise_model
from diffusers_ext.golden_noise.model import GoldenNoiseModel
from diffusers_ext.golden_noise.npnet import NPNet
from diffusers_ext.golden_noise.pair_writer import PairWriter
from diffusers_ext.golden_noise.pairs import PairDataset, open_pairs
from diffusers_ext.golden_noise.pipeline import GoldenNoisePipeline, GoldenNoiseXLPipeline
from diffusers_ext.golden_noise.pipeline_transformers import (
    GoldenNoiseFluxPipeline,
    GoldenNoiseHunyuanDiTPipeline,
    GoldenNoiseSD3Pipeline,
)
from diffusers_ext.golden_noise.redenoise import redenoise, redenoise_sequence, redenoise_text
from diffusers_ext.golden_noise.sequence_rnn import NoiseSequenceRNN
from diffusers_ext.golden_noise.sequence_transformer import NoiseSequenceTransformer


__all__ = [
    "GoldenNoiseFluxPipeline",
    "GoldenNoiseHunyuanDiTPipeline",
    "GoldenNoiseModel",
    "GoldenNoisePipeline",
    "GoldenNoiseSD3Pipeline",
    "GoldenNoiseXLPipeline",
    "NPNet",
    "NoiseSequenceRNN",
    "NoiseSequenceTransformer",
    "PairDataset",
    "PairWriter",
    "TextConditioning",
    "encode_prompts",
    "load_noise_model",
    "open_pairs",
    "redenoise",
    "redenoise_sequence",
    "redenoise_text",
]
