"""The command ``pyprune`` as the shell starts it.

It lies beside the package, because importing anything of `pyprune` imports torch, and ``pyprune --help`` must not
wait for it. What commands do is in `pyprune.cli`.
"""
