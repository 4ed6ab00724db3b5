"""Noise that suits the prompt: targets, networks that predict them, pipelines that use them."""

from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.first_prediction import first_prediction
from diffusers_ext.golden_noise.modular import GoldenNoiseStep
from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork, load_noise_model
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel
from diffusers_ext.golden_noise.networks.guard import NoiseGuard
from diffusers_ext.golden_noise.networks.npnet import NPNet
from diffusers_ext.golden_noise.networks.sequence_rnn import NoiseSequenceRNN
from diffusers_ext.golden_noise.networks.sequence_transformer import NoiseSequenceTransformer
from diffusers_ext.golden_noise.pairs.dataset import PairDataset, open_pairs
from diffusers_ext.golden_noise.pairs.shards import PairWriter
from diffusers_ext.golden_noise.pipelines import (
    GoldenNoiseFlux2KleinPipeline,
    GoldenNoiseFlux2Pipeline,
    GoldenNoiseFluxPipeline,
    GoldenNoiseHunyuanDiTPipeline,
    GoldenNoisePipeline,
    GoldenNoiseQwenImagePipeline,
    GoldenNoiseSD3Pipeline,
    GoldenNoiseXLPipeline,
    GoldenNoiseZImagePipeline,
)
from diffusers_ext.golden_noise.redenoise import encode_prompts, redenoise, redenoise_sequence, redenoise_text

__all__ = [
    "GoldenNoiseFlux2KleinPipeline",
    "GoldenNoiseFlux2Pipeline",
    "GoldenNoiseFluxPipeline",
    "GoldenNoiseHunyuanDiTPipeline",
    "GoldenNoiseModel",
    "GoldenNoiseNetwork",
    "GoldenNoisePipeline",
    "GoldenNoiseQwenImagePipeline",
    "GoldenNoiseSD3Pipeline",
    "GoldenNoiseStep",
    "GoldenNoiseXLPipeline",
    "GoldenNoiseZImagePipeline",
    "NPNet",
    "NoiseGuard",
    "NoiseSequenceRNN",
    "NoiseSequenceTransformer",
    "PairDataset",
    "PairWriter",
    "TextConditioning",
    "encode_prompts",
    "first_prediction",
    "load_noise_model",
    "open_pairs",
    "redenoise",
    "redenoise_sequence",
    "redenoise_text",
]
