"""Writes tests/data/sharding_671b.json: where every parameter of the 671B recipe lies on its mesh.

python tests/parallel/make_sharding_table.py
"""

import json
from pathlib import Path

from configs import deepseek_v3
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import mesh, sharding

MESH = "data=2,pipe=16,expert=64"
PATH = Path(__file__).parents[1] / "data" / "sharding_671b.json"


def table() -> dict:
    decoder = Decoder(deepseek_v3.recipe().model)
    rows = sharding.table(decoder.logical_axes(), decoder.abstract_params(), mesh.parse(MESH))
    return json.loads(json.dumps(rows))  # tuples as lists


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in table().items()]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")
