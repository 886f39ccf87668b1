"""Prints versions, the CPU and the code that runs layers on it: python -m masked_rnn"""

from ._environment import get_env_info

if __name__ == "__main__":
    print(get_env_info())
