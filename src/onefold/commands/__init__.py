"""The commands of `onefold`, a file for each noun.

Each command is a function: its parameters are the options, its docstring the help. It prints; the work is done
elsewhere.
"""
