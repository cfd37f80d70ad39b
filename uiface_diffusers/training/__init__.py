"""What the scripts in `training/` share.

- `options`: the groups of options that they have in common, recipes in YAML, how a script ends
- `datasets`, `order`: what is trained on, in which order, how often each face is drawn
- `schedules`: of the learning rate
- `losses`: what is measured on faces, in float32
- `objectives`: what a denoiser is trained to predict: noise, v, or the velocity of flow matching
- `denoising`: the denoiser and the loss of UIFace
- `means`: running means for the log
- `checkpoints`: complete folders, and what has to be the same on resume
- `recognition`, `face_recognition`: the training of a recognizer, which `uiface bench` needs, too; its parts
- `run`: the engine: batches for the loop of a script, and what is due between its steps

It needs the extra `train`.
"""
