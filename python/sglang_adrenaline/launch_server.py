"""`python -m sglang_adrenaline.launch_server`: a whole deployment on this host, or one server of it.

Must stay cheap to import: SGLang's spawned processes import this module again as their main module.
"""

from __future__ import annotations

import sys

from sglang_adrenaline.errors import AdrenalineError


def main(argv: list[str]) -> int:
    """Exit code: 0 after a stop that was asked for, 1 with one line on standard error otherwise."""
    from sglang_adrenaline.launcher import options
    from sglang_adrenaline.launcher.processes import ERROR_PREFIX

    try:
        role = None if {"-h", "--help"} & set(argv) else options.role_of(argv)
        if role is not None:
            from sglang_adrenaline.launcher import server_entry

            server_entry.run(argv, role)
            return 0
        from sglang_adrenaline.launcher.supervisor import launch

        return launch(options.parse(argv))
    except AdrenalineError as error:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
