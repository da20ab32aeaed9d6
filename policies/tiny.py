"""The laptop's policy: OpenVLA-OFT in small, and an example of how to derive a policy from another one.

Its weights after stage 1, on the arm that is not worn yet, are in policies/tabletop.
"""
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ript
from policies.checkpoints import (check_statistics, check_together, check_trained_with, checksums, fetch,
                                  read_json, refuse, weights_of)
from policies.openvla_oft import OpenVLAOFT


class Keypoints(nn.Module):
    """A tower that learns to see in minutes, by where its channels look: (B, 3, h, w) -> (B, 1, D)."""
    def __init__(self, embed_dim, keypoints=16):
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
                                  nn.Conv2d(32, keypoints, 1))
        self.read = nn.Linear(2 * keypoints, embed_dim)

    def forward(self, pictures):
        heat = self.look(pictures)  # B keypoints h w
        rows, columns = (torch.linspace(-1, 1, n).to(heat) for n in heat.shape[-2:])
        grid = torch.cartesian_prod(rows, columns)  # hw 2
        # A spatial softmax: the mean place of each channel's heat.
        return self.read((heat.flatten(2).softmax(-1) @ grid).flatten(1))[:, None]


class Tiny(OpenVLAOFT):
    """OpenVLA-OFT in small, 0.5M parameters: other towers, bytes for tokens, pictures as they are."""
    TOWER = Keypoints
    TOWERS = (dict(embed_dim=48), dict(embed_dim=48))
    LLM = dict(vocab_size=259, hidden_size=96, intermediate_size=192, num_hidden_layers=2,
               num_attention_heads=4)
    PIXELS = (dict(mean=[0.5] * 3, std=[0.5] * 3),) * 2
    STATISTICS = dict(action=dict(q01=[-1.0] * 7, q99=[1.0] * 7), proprio=dict(q01=[-1.5] * 8, q99=[1.5] * 8))
    PROMPT = "{}"
    trained = ("action_head",)
    adapters_only = False
    # Stage 2 trains all of it but the scale head.
    sft_modules = ("vision_backbone", "projector", "proprio_projector", "language_model", "action_head")
    PRESET = {}  # the suites for small policies have the settings
    PUBLISHED = {}
    IMITATION = {}

    def __init__(self, statistics=None):
        from transformers import ByT5Tokenizer
        statistics = statistics or dict(self.STATISTICS)
        super().__init__(self.LLM, self.TOWERS, self.PIXELS, statistics, ByT5Tokenizer())
        # Bounds of b, normalised action units. They are wide for rotation, which matters little here, because
        # a wide density makes quiet gradients, and narrow for the gripper, whose sign decides.
        places = min(self.A - 1, 3)
        rotations = self.A - 1 - places
        low = [0.1] * places + [0.4] * rotations + [0.1]
        high = [0.2] * places + [0.5] * rotations + [0.2]
        self.scale_range = low, high
        self.train_only(self.trained)

    @staticmethod
    def prepare_picture(picture):
        """A camera's picture as it is, (h, w, 3) uint8."""
        return picture

    @classmethod
    def load(cls, cfg):
        """The policy that stage 3 starts from."""
        refuse(cfg, "adapter", "scale_head")
        made = f"python scripts/sft.py --suite {cfg.suite} makes one"
        ript.require(cfg.checkpoint, f"--checkpoint DIR must name a policy to start from: {made}")
        missing = cfg.checkpoint.startswith("runs/") and not Path(cfg.checkpoint).exists()
        ript.require(not missing, f"there is no policy in {cfg.checkpoint}: {made}")
        policy = cls.from_pretrained(cfg.checkpoint)
        check_trained_with(policy.trained_with, cls.settings_of(cfg), cfg.checkpoint)
        policy.trained_with = cls.settings_of(cfg)
        # A suite may say that all of it learns.
        everything = getattr(ript.load_suite(cfg.suite), "TRAIN_ALL", False)
        policy.train_only(cls.sft_modules if everything else cls.trained)
        policy.scale_multiplier = cfg.scale_multiplier
        # The bounds are scaled too, so that the multiplier acts fully.
        low, high = np.array(policy.scale_range) * cfg.scale_multiplier
        policy.scale_range = (tuple(low), tuple(high))
        return policy.to(cfg.device)

    @classmethod
    def settings_of(cls, cfg):
        """The settings that the weights and the rollouts must agree on; save writes them into config.json."""
        # Stage 1's suite is stage 3's, before the arm was worn.
        return dict(suite=cfg.suite.removesuffix("_pretrain"), image_size=cfg.image_size,
                    collision=cfg.collision)

    @classmethod
    def from_pretrained(cls, path):
        """Read what save wrote. Raises ript.UserError where the files do not fit."""
        with ript.reading(path):
            folder = fetch(path)
        with ript.reading(folder / "config.json"):
            settings = cls.read_settings(folder / "config.json")
        policy = cls(settings["statistics"])
        policy.trained_with = settings.get("origin", {})
        # This copies the weights: to the last bit, results depend on where in memory they are.
        with ript.reading(folder / "model.safetensors"):
            policy.load_state_dict(load_file(folder / "model.safetensors"))
        check_together(folder, settings)
        policy.check_attention()
        return policy

    @staticmethod
    def read_settings(path):
        """What a config.json says: the statistics, and the settings that the policy is made for."""
        settings = read_json(path)
        if not {"statistics"} <= set(settings) <= {"statistics", "origin", "files"}:
            raise ValueError("it is not a tiny policy's")
        check_statistics(settings["statistics"])
        return settings

    def save(self, directory):
        """Write model.safetensors and config.json."""
        directory = Path(directory)
        with ript.writing(directory / "model.safetensors") as file:
            save_file(weights_of(self), file)
        settings = dict(origin=self.trained_with, statistics=self.statistics,
                        files=checksums(directory, "model.safetensors"))
        with ript.writing(directory / "config.json") as file:
            file.write_text(json.dumps(settings, indent=1))
