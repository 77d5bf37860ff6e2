"""DiffScaler: a task scales and shifts what a layer computes, and adds a small bottleneck for what it lacks.

Source: Nair, Cho, Patel?, "Diffscaler: Enhancing the Generative Prowess of Diffusion Transformers", 2024, arXiv 2404.09976.
"""
