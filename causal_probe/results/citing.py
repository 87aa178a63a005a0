"""How results are cited: the works that probes build on, and one sentence for a methods section."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["BIBLIOGRAPHY", "Citation", "cite"]

#: BibTeX of every work that a probe of ours builds on, by its key.
BIBLIOGRAPHY: Mapping[str, str] = {
    "nichani2024": """@inproceedings{nichani2024,
  title     = {How Transformers Learn Causal Structure with Gradient Descent},
  author    = {Nichani, Eshaan and Damian, Alex and Lee, Jason D.},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  eprint    = {2402.14735},
  archivePrefix = {arXiv}
}""",
    "olsson2022": """@article{olsson2022,
  title   = {In-context Learning and Induction Heads},
  author  = {Olsson, Catherine and Elhage, Nelson and Nanda, Neel and Joseph, Nicholas and DasSarma, Nova and others},
  journal = {Transformer Circuits Thread},
  year    = {2022},
  eprint  = {2209.11895},
  archivePrefix = {arXiv}
}""",
    "vonoswald2023": """@inproceedings{vonoswald2023,
  title     = {Transformers Learn In-Context by Gradient Descent},
  author    = {von Oswald, Johannes and Niklasson, Eyvind and Randazzo, Ettore and Sacramento, Jo{\\~a}o and Mordvintsev, Alexander and Zhmoginov, Andrey and Vladymyrov, Max},
  booktitle = {International Conference on Machine Learning},
  year      = {2023},
  eprint    = {2212.07677},
  archivePrefix = {arXiv}
}""",
    "zheng2024": """@inproceedings{zheng2024,
  title     = {On Mesa-Optimization in Autoregressively Trained Transformers: Emergence and Capability},
  author    = {Zheng, Chenyu and Huang, Wei and Wang, Rongzhen and Wu, Guoqiang and Zhu, Jun and Li, Chongxuan},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  eprint    = {2405.16845},
  archivePrefix = {arXiv}
}""",
    "dangelo2025": """@inproceedings{dangelo2025,
  title     = {Selective Induction Heads: How Transformers Select Causal Structures in Context},
  author    = {D'Angelo, Francesco and Croce, Francesco and Flammarion, Nicolas},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  eprint    = {2509.08184},
  archivePrefix = {arXiv}
}""",
    "park2025": """@inproceedings{park2025,
  title     = {Competition Dynamics Shape Algorithmic Phases of In-Context Learning},
  author    = {Park, Core Francisco and Lubana, Ekdeep Singh and Pres, Itamar and Tanaka, Hidenori},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  eprint    = {2412.01003},
  archivePrefix = {arXiv}
}""",
    "wu2025": """@inproceedings{wu2025,
  title     = {How Do Transformers Learn Variable Binding in Symbolic Programs?},
  author    = {Wu, Yiwei and Geiger, Atticus and Milli{\\`e}re, Rapha{\\"e}l},
  booktitle = {International Conference on Machine Learning},
  year      = {2025},
  eprint    = {2505.20896},
  archivePrefix = {arXiv}
}""",
    "westfall1993": """@book{westfall1993,
  title     = {Resampling-Based Multiple Testing: Examples and Methods for p-Value Adjustment},
  author    = {Westfall, Peter H. and Young, S. Stanley},
  publisher = {Wiley},
  year      = {1993}
}""",
    "clark2019": """@inproceedings{clark2019,
  title     = {What Does {BERT} Look at? {A}n Analysis of {BERT}'s Attention},
  author    = {Clark, Kevin and Khandelwal, Urvashi and Levy, Omer and Manning, Christopher D.},
  booktitle = {BlackboxNLP},
  year      = {2019},
  eprint    = {1906.04341},
  archivePrefix = {arXiv}
}""",
    "htut2019": """@article{htut2019,
  title  = {Do Attention Heads in {BERT} Track Syntactic Dependencies?},
  author = {Htut, Phu Mon and Phang, Jason and Bordia, Shikha and Bowman, Samuel R.},
  year   = {2019},
  eprint = {1911.12246},
  archivePrefix = {arXiv}
}""",
    "zuo2024": """@article{zuo2024,
  title  = {Breaking Symmetry When Training Transformers},
  author = {Zuo, Chunsheng and Guerzhoy, Michael},
  year   = {2024},
  eprint = {2402.05969},
  archivePrefix = {arXiv}
}""",
    "lan2024": """@inproceedings{lan2024,
  title     = {Towards Interpretable Sequence Continuation: Analyzing Shared Circuits in Large Language Models},
  author    = {Lan, Michael and Torr, Philip and Barez, Fazl},
  booktitle = {Empirical Methods in Natural Language Processing},
  year      = {2024},
  eprint    = {2311.04131},
  archivePrefix = {arXiv}
}""",
    "gould2024": """@inproceedings{gould2024,
  title     = {Successor Heads: Recurring, Interpretable Attention Heads In The Wild},
  author    = {Gould, Rhys and Ong, Euan and Ogden, George and Conmy, Arthur},
  booktitle = {International Conference on Learning Representations},
  year      = {2024},
  eprint    = {2312.09230},
  archivePrefix = {arXiv}
}""",
    "bhojanapalli2021": """@article{bhojanapalli2021,
  title  = {Eigen Analysis of Self-Attention and its Reconstruction from Partial Computation},
  author = {Bhojanapalli, Srinadh and Chakrabarti, Ayan and Jain, Himanshu and Kumar, Sanjiv and Lukasik, Michal and Veit, Andreas},
  year   = {2021},
  eprint = {2106.08823},
  archivePrefix = {arXiv}
}""",
    "murty2023": """@inproceedings{murty2023,
  title     = {Characterizing Intrinsic Compositionality in Transformers with Tree Projections},
  author    = {Murty, Shikhar and Sharma, Pratyusha and Andreas, Jacob and Manning, Christopher D.},
  booktitle = {International Conference on Learning Representations},
  year      = {2023},
  eprint    = {2211.01288},
  archivePrefix = {arXiv}
}""",
    "rohekar2023": """@inproceedings{rohekar2023,
  title     = {Causal Interpretation of Self-Attention in Pre-Trained Transformers},
  author    = {Rohekar, Raanan Y. and Gurwicz, Yaniv and Nisimov, Shami},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023},
  eprint    = {2310.20307},
  archivePrefix = {arXiv}
}""",
    "rohekar2021": """@inproceedings{rohekar2021,
  title     = {Iterative Causal Discovery in the Possible Presence of Latent Confounders and Selection Bias},
  author    = {Rohekar, Raanan Y. and Nisimov, Shami and Gurwicz, Yaniv and Novik, Gal},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2021}
}""",
    "rohekar2024": """@misc{rohekar2024,
  title  = {A Causal World Model Underlying Next Token Prediction: Exploring {GPT} in a Controlled Environment},
  author = {Rohekar, Raanan Y. and Gurwicz, Yaniv and Yu, Sungduk and Aflalo, Estelle and Lal, Vasudev},
  year   = {2024},
  eprint = {2412.07446},
  archivePrefix = {arXiv}
}""",
    "tsamardinos2006": """@article{tsamardinos2006,
  title   = {The max-min hill-climbing {Bayesian} network structure learning algorithm},
  author  = {Tsamardinos, Ioannis and Brown, Laura E. and Aliferis, Constantin F.},
  journal = {Machine Learning},
  volume  = {65},
  number  = {1},
  pages   = {31--78},
  year    = {2006},
  doi     = {10.1007/s10994-006-6889-7}
}""",
    "chow1968": """@article{chow1968,
  title   = {Approximating discrete probability distributions with dependence trees},
  author  = {Chow, C. K. and Liu, C. N.},
  journal = {IEEE Transactions on Information Theory},
  volume  = {14},
  number  = {3},
  pages   = {462--467},
  year    = {1968},
  doi     = {10.1109/TIT.1968.1054142}
}""",
    "heckerman1995": """@article{heckerman1995,
  title   = {Learning {Bayesian} Networks: The Combination of Knowledge and Statistical Data},
  author  = {Heckerman, David and Geiger, Dan and Chickering, David M.},
  journal = {Machine Learning},
  volume  = {20},
  number  = {3},
  pages   = {197--243},
  year    = {1995},
  doi     = {10.1007/BF00994016}
}""",
    "besag1989": """@article{besag1989,
  title   = {Generalized {Monte Carlo} significance tests},
  author  = {Besag, Julian and Clifford, Peter},
  journal = {Biometrika},
  volume  = {76},
  number  = {4},
  pages   = {633--642},
  year    = {1989},
  doi     = {10.1093/biomet/76.4.633}
}""",
    "elhage2021": """@article{elhage2021,
  title   = {A Mathematical Framework for Transformer Circuits},
  author  = {Elhage, Nelson and Nanda, Neel and Olsson, Catherine and Henighan, Tom and Joseph, Nicholas and others},
  journal = {Transformer Circuits Thread},
  year    = {2021}
}""",
    "lindner2023": """@inproceedings{lindner2023,
  title         = {Tracr: Compiled Transformers as a Laboratory for Interpretability},
  author        = {Lindner, David and Kram{\\'a}r, J{\\'a}nos and Farquhar, Sebastian and Rahtz, Matthew and McGrath, Thomas and Mikulik, Vladimir},
  booktitle     = {Advances in Neural Information Processing Systems},
  year          = {2023},
  eprint        = {2301.05062},
  archiveprefix = {arXiv}
}""",
    "gupta2024": """@inproceedings{gupta2024,
  title         = {{InterpBench}: Semi-Synthetic Transformers for Evaluating Mechanistic Interpretability Techniques},
  author        = {Gupta, Rohan and Arcuschin, Iv{\\'a}n and Kwa, Thomas and Garriga-Alonso, Adri{\\`a}},
  booktitle     = {Advances in Neural Information Processing Systems},
  year          = {2024},
  eprint        = {2407.14494},
  archiveprefix = {arXiv}
}""",
    "conmy2023": """@inproceedings{conmy2023,
  title         = {Towards Automated Circuit Discovery for Mechanistic Interpretability},
  author        = {Conmy, Arthur and Mavor-Parker, Augustine N. and Lynch, Aengus and Heimersheim, Stefan and Garriga-Alonso, Adri{\\`a}},
  booktitle     = {Advances in Neural Information Processing Systems},
  year          = {2023},
  eprint        = {2304.14997},
  archiveprefix = {arXiv}
}""",
    "syed2023": """@inproceedings{syed2023,
  title         = {Attribution Patching Outperforms Automated Circuit Discovery},
  author        = {Syed, Aaquib and Rager, Can and Conmy, Arthur},
  booktitle     = {Proceedings of the 7th BlackboxNLP Workshop},
  year          = {2024},
  eprint        = {2310.10348},
  archiveprefix = {arXiv}
}""",
    "hanna2024": """@inproceedings{hanna2024,
  title         = {Have Faith in Faithfulness: Going Beyond Circuit Overlap When Finding Model Mechanisms},
  author        = {Hanna, Michael and Pezzelle, Sandro and Belinkov, Yonatan},
  booktitle     = {Conference on Language Modeling},
  year          = {2024},
  eprint        = {2403.17806},
  archiveprefix = {arXiv}
}""",
    "hanna2023": """@inproceedings{hanna2023,
  title         = {How does {GPT-2} compute greater-than?: Interpreting mathematical abilities in a pre-trained language model},
  author        = {Hanna, Michael and Liu, Ollie and Variengien, Alexandre},
  booktitle     = {Advances in Neural Information Processing Systems},
  year          = {2023},
  eprint        = {2305.00586},
  archiveprefix = {arXiv}
}""",
    "wang2023": """@inproceedings{wang2023,
  title         = {Interpretability in the Wild: a Circuit for Indirect Object Identification in {GPT-2} small},
  author        = {Wang, Kevin and Variengien, Alexandre and Conmy, Arthur and Shlegeris, Buck and Steinhardt, Jacob},
  booktitle     = {International Conference on Learning Representations},
  year          = {2023},
  eprint        = {2211.00593},
  archiveprefix = {arXiv}
}""",
    "geiger2022": """@inproceedings{geiger2022,
  title         = {Inducing Causal Structure for Interpretable Neural Networks},
  author        = {Geiger, Atticus and Wu, Zhengxuan and Lu, Hanson and Rozner, Josh and Kreiss, Elisa and Icard, Thomas and Goodman, Noah D. and Potts, Christopher},
  booktitle     = {International Conference on Machine Learning},
  year          = {2022},
  eprint        = {2112.00826},
  archiveprefix = {arXiv}
}""",
}


@dataclasses.dataclass(frozen=True)
class Citation:
    """How to cite a result: ``bibtex`` (one entry per work) and ``methods`` (one sentence for a paper's methods section)."""

    bibtex: str
    methods: str

    def __str__(self) -> str:
        return f"{self.methods}\n\n{self.bibtex}"


def cite(*keys: str, methods: str) -> Citation:
    """The entries of :data:`BIBLIOGRAPHY` under ``keys`` beside one methods sentence.

    Raises
    ------
    KeyError
        If a key is not in the bibliography: that is a mistake of ours, not of the user's.

    Examples
    --------
    >>> cite("nichani2024", methods="A graph was recovered.").methods
    'A graph was recovered.'
    """
    return Citation("\n\n".join(BIBLIOGRAPHY[key] for key in keys), methods)
