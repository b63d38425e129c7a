"""Pretraining: losses, optimizer, schedules, the step, the loop.

loss.py         what is minimised, term by term
router_bias.py  the one parameter no gradient moves
optimizer.py    AdamW with bfloat16 moments
schedules.py    learning rate, batch size, loss weights: pure functions of step and tokens
step.py         one jitted training step
loop.py         a run: data, steps, metrics, evaluation, checkpoints
"""
