"""What the embedded model is trained and examined on, and the parts of its training.

Read in this order: `sources` (fonts, words, colours), `scenes` (what a picture holds), `sampling`
(scenes by chance), `drawing` (pixels and patch labels), `questions` (what is asked and answered),
`talk`, `chat` (tokenizer and prompts), `batches` (tensors); then `model` (size, start, label head),
`forward` (many rows at once), `optimizer`, `training` (the loop, a helping process, checkpoints),
`export` (the official layout) and `plot`; and `exam`, `sets` (other questions than the exam's),
`answers` (what a model says to them) and `trimming` (what it says with fewer visual tokens).
"""
