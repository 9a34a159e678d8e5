"""allspark prepare DATASET: official archives -> the layout that the configs expect."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from allspark.config_io import root_variable
from allspark.prepare import PLANS
from allspark.prepare.plan import Options, is_finished, prepare
from allspark.utils.download import fetch
from allspark.utils.errors import UserError
from allspark.utils.parallel import usable_cores

MAX_WORKERS = 16  # by default; more would wait for the disk


def main(args: argparse.Namespace) -> None:
    plan = next(plan for name, plan in PLANS.items() if args.dataset in (name, plan.dataset))
    archives = ", ".join(f"{archive.name} ({archive.origin})" for archive in plan.archives)
    usual = os.environ.get(root_variable(plan.dataset)) or f"data/{plan.dataset}"
    out = args.out or Path(os.path.expanduser(usual))
    sources = list(args.sources or ())
    if args.download and (args.force or not is_finished(plan, out)):
        if not all(archive.urls for archive in plan.archives):
            raise UserError(f"--download: {args.dataset} has no public download; get {archives} and give --from")
        sources += [fetch(archive.urls, out / archive.name, digest=archive.digest) for archive in plan.archives]
    if not sources and not out.is_dir():
        raise UserError(f"{out}: does not exist; put {archives} there or give their paths with --from")
    options = Options(
        tuple(sources or [out]),
        out,
        args.workers or min(usable_cores(), MAX_WORKERS),
        args.force,
        args.allow_partial,
        args.ignore_unknown,
    )
    try:
        prepare(plan, options)
    except KeyboardInterrupt:
        raise UserError(f"{out}: interrupted; run the same command again to continue") from None
