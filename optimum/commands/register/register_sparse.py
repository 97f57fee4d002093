"""Found by optimum-cli: adds `optimum-cli sparse`. No folder up to here may have an `__init__.py`."""

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class SparseCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="sparse", help="Prune language models, evaluate and convert sparse checkpoints.")

    @staticmethod
    def parse_args(parser):
        from optimum_sparse.cli import add_commands

        add_commands(parser)

    def run(self):
        from optimum_sparse.cli import run

        raise SystemExit(run(self.args))


REGISTER_COMMANDS = [SparseCommand]
