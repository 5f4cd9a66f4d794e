"""Fuzzes the decoder with atheris: `python tests/fuzz/run.py [--seconds 600] [TARGET...]`; needs `pip install atheris`.

Runs the targets one after the other, each for this time, from the conformance set as seeds, and prints the number of
executions and the processor time they had, which is less on a machine that has other work to do. A finding ends the run
with its traceback; the file that shows it is kept beside the corpus. It belongs in tests/golden/refuse then, by way of
make_golden.py.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGETS = ("unpack", "decode", "preview", "info", "pillow")
INSTRUMENTED = ["vqcodec.codec", "vqcodec.image", "vqcodec.pillow", "cli"]
INSTRUMENTED += ["PIL.Image", "PIL.ImageFile", "PIL.PngImagePlugin"]


def fuzz(target: str, options: list[str]) -> None:
    """Runs in a process of its own: libFuzzer ends it."""
    import atheris

    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    import bitstream.kernels  # noqa: F401  # not instrumented: numba would not compile that

    with atheris.instrument_imports(include=["bitstream"]):
        import bitstream.container
        import bitstream.indices  # noqa: F401

    import vqcodec.compiled  # noqa: F401  # as little as the kernels

    with atheris.instrument_imports(include=INSTRUMENTED):
        import targets

        import vqcodec.pillow  # noqa: F401  # the target imports it late
    targets.decode((HERE.parent / "golden/decode/grey.vq2").read_bytes())  # compiles, longer than a timeout may be

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        mutated = atheris.Mutate(data, max_size)
        return (mutated, targets.repaired(mutated), targets.restructured(data, seed))[seed % 3][:max_size]

    atheris.Setup([target, *options], targets.TARGETS[target], custom_mutator=mutate)
    atheris.Fuzz()


def run(target: str, seconds: int, folder: Path) -> bool:
    corpus = folder / target
    corpus.mkdir(parents=True, exist_ok=True)
    for path in HERE.parent.glob("golden/*/*.vq2"):
        shutil.copy(path, corpus / f"{path.parent.name}-{path.name}")
    options = [str(corpus), f"-max_total_time={seconds}", "-max_len=4096", "-timeout=60", "-rss_limit_mb=2048"]
    options += ["-print_final_stats=1", f"-artifact_prefix={folder}/{target}-"]
    command = [sys.executable, __file__, "--child", target, *options]
    before = os.times()
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    executions = re.search(r"number_of_executed_units:\s*(\d+)", result.stdout)
    coverage = re.findall(r"cov: (\d+)", result.stdout)
    if result.returncode or not executions or not coverage:
        print(result.stdout[-4000:])
        print(f"{target}: a finding, or a failure to run; see {folder}")
        return False
    figures = f"{int(executions[1]):,} executions in {seconds} s ({spent:.0f} s of a processor)"
    print(f"{target}: {figures}, coverage {coverage[-1]}, no finding", flush=True)
    return True


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        fuzz(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", metavar="TARGET", nargs="*", help=f"of {', '.join(TARGETS)}; all if none is named")
    parser.add_argument("--seconds", type=int, default=600, help="for each target (600)")
    parser.add_argument("--folder", type=Path, help="keeps corpus and findings; a new temporary folder if not named")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="vqcodec-fuzz-"))
    if not all([run(target, options.seconds, folder) for target in options.targets or TARGETS]):
        sys.exit(1)


if __name__ == "__main__":
    main()
