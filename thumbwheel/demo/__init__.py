"""The main job on real input: simulated users chat and vote, the policy learns, gates judge, the swap happens."""
