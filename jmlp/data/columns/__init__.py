"""Columns of tables: from cells of any kind to the inputs of a model, and what was fitted.

What cells of text say (numbers, dates, truth values): `cells`; a column as numbers: `values`,
`objects`. What each column is taken for, and why: `infer`; all of them together: `plans`.
Statistics and levels of the training rows, and rows encoded by them: `column`, `fit`. What
`jmlp inspect` shows and writes: `inspect`. Embeddings and one-hot features are made on the
devices, by `jmlp.model.ColumnEncoder`.
"""
