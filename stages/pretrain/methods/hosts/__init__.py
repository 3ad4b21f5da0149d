"""The methods that DSA's paper regularises, from SimCLR to MAE; each trains by itself too.

Most differ in their loss only, so each is one file here and one in settings/. They import methods/shared and lightly.
"""
