"""Rules on imports that import-linter's contracts in pyproject.toml do not cover."""

from graphlib import TopologicalSorter

import grimp


def test_there_is_no_import_circle():
    graph = grimp.build_graph("hfmpi", exclude_type_checking_imports=True)  # the package imports lazily
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert imports["hfmpi.networks.network"]
    TopologicalSorter(imports).prepare()  # raises CycleError
