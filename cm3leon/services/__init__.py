"""Local servers, child processes, DVC's commands, disk space; and the environment that processes run in."""
