"""BibTeX of the methods' papers and of this package."""

from __future__ import annotations

import textwrap


# key -> (authors, title, year, arXiv number)
PAPERS: dict[str, tuple[str, str, int, str]] = {
    "dreambooth": (
        "Ruiz, Nataniel and Li, Yuanzhen and Jampani, Varun and Pritch, Yael and Rubinstein, "
        "Michael and Aberman, Kfir",
        "{DreamBooth}: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation",
        2022,
        "2208.12242",
    ),
    "alphaedit": (
        "Fang, Junfeng and Jiang, Houcheng and Wang, Kun and Ma, Yunshan and Shi, Jie and "
        "Wang, Xiang and He, Xiangnan and Chua, Tat-Seng",
        "{AlphaEdit}: Null-Space Constrained Knowledge Editing for Language Models",
        2024,
        "2410.02355",
    ),
    "inflora": (
        "Liang, Yan-Shuo and Li, Wu-Jun",
        "{InfLoRA}: Interference-Free Low-Rank Adaptation for Continual Learning",
        2024,
        "2404.00228",
    ),
    "golden_noise": (
        "Zhou, Zikai and Shao, Shitong and Bai, Lichen and Zhang, Shufei and Xu, Zhiqiang and "
        "Han, Bo and Xie, Zeke",
        "Golden Noise for Diffusion Models: A Learning Framework",
        2024,
        "2411.09502",
    ),
    "t2vunlearning": (
        "Ye, Xiaoyu and Cheng, Songjie and Wang, Yongtao and Xiong, Yajiao and Li, Yishen",
        "{T2VUnlearning}: A Concept Erasing Method for Text-to-Video Diffusion Models",
        2025,
        "2505.17550",
    ),
    "receler": (
        "Huang, Chi-Pin and Chang, Kai-Po and Tsai, Chung-Ting and Lai, Yung-Hsuan and "
        "Yang, Fu-En and Wang, Yu-Chiang Frank",
        "{Receler}: Reliable Concept Erasing of Text-to-Image Diffusion Models via Lightweight "
        "Erasers",
        2023,
        "2311.17717",
    ),
}


def bibtex(papers: tuple[str, ...], version: str) -> str:
    """Entries for papers, then one for this package.

    Args:
        papers: keys of `PAPERS`.
        version: of the package.
    """
    entries = []
    for key in papers:
        authors, title, year, number = PAPERS[key]
        wrapped = "\n    ".join(textwrap.wrap(authors, 80))
        entries.append(
            f"@article{{{key},\n  author = {{{wrapped}}},\n  title = {{{title}}},\n"
            f"  journal = {{arXiv:{number}}},\n  year = {{{year}}}\n}}"
        )
    entries.append(
        "@software{diffusers_ext,\n"
        "  title = {diffusers\\_ext: null-space DreamBooth, golden noise and a concept eraser for "
        f"diffusers}},\n  version = {{{version}}}\n}}"
    )
    return "\n\n".join(entries)
