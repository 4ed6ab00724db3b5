"""The whole campaign: `python -m tests.campaign [loads] [kills]`; ends with 1 where something is wrong."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from tests.campaign.artifacts import KINDS
from tests.campaign.loads import FAULTS, Campaign, cases, keep, summary


def main() -> int:
    """Run what is asked for; print counts and every fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["loads", "kills"], choices=["loads", "kills"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="only kinds whose name holds these words")
    parser.add_argument("--output_dir", default="outputs/campaign")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)  # a fork of several threads may wait for ever
    failed = False
    with tempfile.TemporaryDirectory(prefix="campaign-") as work:
        if "loads" in args.what:
            failed |= run_loads(args, Path(work))
        if "kills" in args.what:
            from tests.campaign.kills import run_kills

            failed |= run_kills(args.seed, Path(work), args.kind)
    return int(failed)


def run_loads(args: argparse.Namespace, work: Path) -> bool:
    """Load every altered artifact; whether one ended in a fault."""
    kinds = {name: kind for name, kind in KINDS.items() if not args.kind or args.kind in name}
    campaign, loads = Campaign(work), []
    for case in cases(work / "originals", args.seed, kinds):
        loads.append(campaign.run(case))
        load = loads[-1]
        if load.outcome in FAULTS:
            print(f"{load.outcome}: {load.kind}, {load.file}, {load.mutation} {load.detail[:300]}", flush=True)
    keep(loads, Path(args.output_dir, "loads.jsonl"))
    print(f"{len(loads)} loads of {len(kinds)} kinds")
    for outcome, count in summary(loads).items():
        print(f"  {count:5d} {outcome}")
    return any(load.outcome in FAULTS for load in loads)


if __name__ == "__main__":
    sys.exit(main())
