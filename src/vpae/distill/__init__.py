"""Distillation: METHODS, the one table that settings, stages, rules, report, plan and benchmarks read.

A method is one file in this folder and one row here. A method of another package is a row of its entry points:
`[project.entry-points."vpae.methods"] name = "module:Class"`.
"""

from importlib.metadata import entry_points

from vpae.distill.apt import Apt
from vpae.distill.consistency import Consistency
from vpae.distill.dmd2 import Dfd, Dmd2
from vpae.distill.equilibrium import Equilibrium
from vpae.distill.magic import Magic
from vpae.distill.method import Method
from vpae.distill.priming import Priming

CHAIN = (Priming, Equilibrium)  # what an experiment trains unless it says otherwise: the paper's method
METHODS: dict[str, type[Method]] = {method.name: method for method in (*CHAIN, Consistency, Dmd2, Dfd, Apt, Magic)}


def _add_those_of_others() -> None:
    for point in sorted(entry_points(group="vpae.methods"), key=lambda point: point.name):
        method = point.load()
        if METHODS.setdefault(method.name, method) is not method:
            raise ValueError(f"entry point {point.value}: there is a method {method.name} already; choose another name")


_add_those_of_others()
