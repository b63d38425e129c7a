"""Train a model: `python train.py [RECIPE] [options]`. RECIPE is a name in configs/ (tiny by default) or a path of such a file.

python train.py                                   the recipe tiny, from nothing to a sample, on any machine
python train.py small --workdir runs/small        goes on where the folder left off, if it holds a run
python train.py tiny --model.hidden-size 128      every field of a recipe is an option
python train.py small --supervise 8               eight processes, a GPU each, started again when one dies or stops
python train.py deepseek_v3 --dry-run             parameters, bytes a device, tokens a step; nothing is allocated
"""

import dataclasses
import os
import shlex
import signal
import sys
from pathlib import Path

import tyro

from dsv3_jax import command_line, recipes
from dsv3_jax.config import TrainConfig, did_you_mean
from dsv3_jax.errors import UserError
from dsv3_jax.parallel import processes


@dataclasses.dataclass(frozen=True)
class Command(TrainConfig):
    """What a recipe says, and what only the command line does."""

    dry_run: bool = False  # print parameters, bytes a device and tokens a step, and stop
    aot: bool = False  # with --dry-run: compile the step too, for the mesh's number of Hopper GPUs, which need not exist
    fake_devices: int | None = None  # rehearse so many devices on a CPU (in each process)
    coordinator: str | None = None  # HOST:PORT of the first of several processes; SLURM, OpenMPI and Kubernetes say all this themselves
    num_processes: int | None = None
    process_id: int | None = None
    supervise: int | None = None  # start so many processes here, one a GPU, and start them again when one dies or stops
    min_processes: int | None = None  # go on with as few, where one does not come up any more; default: all


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 2 wrong input or a run that cannot go on, 128 + N stopped by signal N with everything saved (a
    second Ctrl-C ends the process at once: the save in flight is lost)."""
    return command_line.run(lambda: train(argv))


def train(argv: list[str]) -> int:
    named = bool(argv) and not argv[0].startswith("-")
    recipe, options = (argv[0], argv[1:]) if named else ("tiny", argv)
    command = parse(recipes.train_config(recipe), options)
    config = TrainConfig(**{field.name: getattr(command, field.name) for field in dataclasses.fields(TrainConfig)})
    config = dataclasses.replace(config, workdir=config.workdir.replace("{recipe}", Path(recipe).stem))
    if command.aot and not command.dry_run:
        raise UserError("--aot compiles without running anything: give --dry-run with it")
    if command.fake_devices is not None and command.fake_devices < 1:
        raise UserError(f"--fake-devices {command.fake_devices} must be at least 1")
    if command.min_processes is not None and command.supervise is None:
        raise UserError("--min-processes says how few --supervise may go on with: give --supervise with it")
    if command.supervise is not None:
        if command.process_id is None or "--coordinator" not in argv:
            return supervise(command, config, argv)
        processes.end_with_parent()
        argv = argv[: argv.index("--coordinator")]  # of a supervised process: the command that is shown is the user's
    set_environment(command)  # JAX reads it when it is first imported
    processes.join(command.coordinator, command.num_processes, command.process_id)
    command_line.check_backend()

    if command.dry_run:
        import jax

        from dsv3_jax.training import aot, dry_run

        if command.aot:
            print(aot.report(config))
        else:
            print(dry_run.report(config, jax.device_count()))
        return 0

    import jax

    from dsv3_jax.training import loop

    result = loop.run(config)
    if jax.process_index() > 0:
        return 0 if result.stopped_by is None else 128 + result.stopped_by
    if result.stopped_by is not None:
        print(f"stopped by {signal.Signals(result.stopped_by).name} after step {result.step}; go on with:\n  {going_on(argv)}")
        return 128 + result.stopped_by
    if result.heldout_bits_per_byte is not None:
        gzip = result.prepared.heldout_gzip9_bits_per_byte
        print(f"held-out text: {result.heldout_bits_per_byte:.3f} bits per byte (gzip -9 of the same files: {gzip:.3f})")
    if jax.process_count() == 1:
        print_sample(result)
    serve = shlex.join([*runner(), "serve.py", str(result.directory), "--prompt", "import "])
    print(f"train on:  {going_on(argv, 2 * config.steps)}\ngenerate:  {serve}")
    return 0


def supervise(command: Command, config: TrainConfig, argv: list[str]) -> int:
    """Run the same command in several processes."""
    most, least = command.supervise, command.supervise if command.min_processes is None else command.min_processes
    if not 1 <= least <= most:
        fewest = "" if command.min_processes is None else f" and --min-processes {least}"
        raise UserError(f"--supervise {most}{fewest}: give at least one process, and no more for the fewest")
    if any(value is not None for value in (command.coordinator, command.num_processes, command.process_id)):
        raise UserError("--supervise starts the processes itself: leave --coordinator, --num-processes and --process-id out")
    from dsv3_jax.training import supervisor

    return supervisor.run([sys.executable, *sys.argv[:1], *argv], config, most, least, command.fake_devices or 1)


def going_on(argv: list[str], steps: int | None = None) -> str:
    """The same command, with another number of steps if one is given. --resume is left out: it would go back to where this run began."""
    replaced = ["--resume"] if steps is None else ["--resume", "--steps"]
    others = [arg for before, arg in zip(["", *argv], argv) if before not in replaced and arg.partition("=")[0] not in replaced]
    return shlex.join([*runner(), "train.py", *others, *([] if steps is None else ["--steps", str(steps)])])


def runner() -> list[str]:
    """How this process was started, for commands that are to be copied: uv says so to what it runs."""
    return ["uv", "run"] if "UV" in os.environ else ["python"]


def parse(recipe: TrainConfig, options: list[str]) -> Command:
    """The recipe with options put over it. Raises UserError where an option is unknown or its value wrong; exits after --help."""
    default = Command(**{field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)})
    known = set(field_names(default)) | {"help"}
    for option in options:
        name = option.partition("=")[0].removeprefix("--").replace("_", "-")
        if option.startswith("--") and name not in known and name.removeprefix("no-") not in known:
            raise UserError(f"unknown option --{name}{did_you_mean(name, known)}: --help lists them")
    options = {"default": default, "args": options, "prog": "train.py [RECIPE]", "config": (tyro.conf.AvoidSubcommands,)}
    description = f"{__doc__}Recipes: {', '.join(recipes.names())}. The defaults below are those of the one that is named."
    options["description"] = description.replace("\n", "\n\n")  # else tyro joins the lines
    return command_line.parsed(lambda: tyro.cli(Command, **options))


def field_names(config, prefix: str = "") -> list[str]:
    """The options of a config: `steps`, `model.hidden-size`, ..."""
    names = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name.replace("_", "-")
        names += field_names(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return names


def set_environment(command: Command) -> None:
    flags = []
    if command.fake_devices is not None:
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags.append(f"--xla_force_host_platform_device_count={command.fake_devices}")
    if command.deterministic:
        flags.append("--xla_gpu_deterministic_ops=true")
    if flags:
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()


def print_sample(result) -> None:
    """How the model goes on from the beginning of a held-out document."""
    import dsv3_jax
    from dsv3_jax.data.loader import heldout_batches

    model = dsv3_jax.load(result.directory)
    if result.prepared.heldout.rows:
        tokens = next(heldout_batches(result.prepared.directory, 1))["tokens"][0, :48].tolist()
    else:
        tokens = model.tokenizer.encode("")
    answer = model.generate([tokens], max_new_tokens=64)[0]
    print(f"sample:\n{model.tokenizer.decode(tokens)}[...]{model.tokenizer.decode(answer)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
