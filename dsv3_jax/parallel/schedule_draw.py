"""A picture of a pipeline schedule, one row per rank, in the manner of figure 5 of the DeepSeek-V3 report. Needs matplotlib."""

from dsv3_jax.errors import needs_extra
from dsv3_jax.parallel.schedule import Schedule, Simulation, parts

# What each action is called and its colours: one for chunk 0, a darker one for chunk 1.
STYLE = {
    "F": ("forward", "#f9dc8c", "#eab543"),
    "B": ("backward", "#a8d8a4", "#5fae6b"),
    "I": ("backward for input", "#b9e3e6", "#6fbcc4"),
    "W": ("backward for weights", "#b8cdf2", "#7c9fe0"),
}


def draw(schedule: Schedule, simulation: Simulation, output: str) -> None:
    """Writes the picture to `output`, in the format of its suffix. A cell's number is its microbatch; a black frame holds a forward and a
    backward that overlap. Raises UserError without matplotlib, ValueError for an unknown format."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch, Rectangle
    except ImportError:
        raise needs_extra("drawing", "plots") from None

    figure = Figure(figsize=(max(7.0, 0.2 * simulation.makespan), 1.0 + 0.3 * schedule.num_ranks), layout="constrained", dpi=150)
    axes = figure.subplots()
    for rank in range(schedule.num_ranks):
        for action, start, end in zip(schedule.actions[rank], simulation.starts[rank], simulation.ends[rank]):
            cells = parts(action)
            left = start
            for name, p, c in cells:
                # an overlapped pair: the forward takes a third of the frame, as with F = I = W
                width = (end - start) * (1 if len(cells) == 1 else 1 / 3 if name == "F" else 2 / 3)
                axes.add_patch(Rectangle((left, rank), width, 1, facecolor=STYLE[name][1 + p], edgecolor="white", linewidth=0.5))
                axes.text(left + width / 2, rank + 0.5, schedule.microbatch(p, c), ha="center", va="center_baseline", fontsize=6)
                left += width
            if len(cells) == 2:
                axes.add_patch(Rectangle((start, rank), end - start, 1, fill=False, edgecolor="black", linewidth=1, zorder=3))

    axes.set(xlim=(0, simulation.makespan), ylim=(schedule.num_ranks, 0), xlabel="time")
    axes.set_yticks([rank + 0.5 for rank in range(schedule.num_ranks)], [f"rank {rank}" for rank in range(schedule.num_ranks)], fontsize=7)
    axes.tick_params(length=0, labelsize=7)
    axes.spines[:].set_visible(False)
    axes.set_facecolor("#efefef")  # idle time
    axes.set_title(f"{schedule.kind}, {schedule.num_ranks} ranks, {schedule.num_microbatches} microbatches", fontsize=9)

    used = {(name, p) for actions in schedule.actions for action in actions for name, p, _ in parts(action)}
    second = "other direction" if schedule.kind == "dualpipe" else "way back"
    patches = [
        Patch(facecolor=colour, label=label if p == 0 else f"{label}, {second}")
        for name, (label, *colours) in STYLE.items()
        for p, colour in enumerate(colours)
        if (name, p) in used
    ]
    if any(action[0] == "FB" for actions in schedule.actions for action in actions):
        patches.append(Patch(facecolor="none", edgecolor="black", label="overlapped forward & backward"))
    figure.legend(handles=patches, loc="outside lower center", ncols=5, fontsize=6, frameon=False)
    figure.savefig(output)
