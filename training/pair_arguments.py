"""The settings of noise pairs, by the names that the evaluation of golden noise has for them."""

from diffusers_ext.golden_noise.settings import CandidateSettings, FilterSettings


add_pair_arguments, add_filter_arguments = CandidateSettings, FilterSettings
