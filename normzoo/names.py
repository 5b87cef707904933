"""Short names that recipes may use, and the classes they stand for. Nothing here needs torch."""

from __future__ import annotations

SHORT_NAMES: dict[str, dict[str, str]] = {
    "model": {},
    "data": {
        "cifar10": "normzoo.data.CIFAR10",
        "fashion_mnist": "normzoo.data.FashionMNIST",
        "image_folder": "normzoo.data.ImageFolder",
    },
    "callbacks": {
        "channel_moments": "normzoo.callbacks.ChannelMoments",
        "class_gradients": "normzoo.callbacks.ClassGradients",
        "divergence": "normzoo.callbacks.Divergence",
        "gradient_noise": "normzoo.callbacks.GradientNoise",
        "gradient_norm": "normzoo.callbacks.GradientNorm",
        "gradient_predictiveness": "normzoo.callbacks.GradientPredictiveness",
        "gradient_sums": "normzoo.callbacks.GradientSums",
        "gradient_tails": "normzoo.callbacks.GradientTails",
        "parameter_norms": "normzoo.callbacks.ParameterNorms",
        "relative_loss": "normzoo.callbacks.RelativeLoss",
        "sharpness": "normzoo.callbacks.Sharpness",
        "early_stopping": "lightning.pytorch.callbacks.EarlyStopping",
        "lr_monitor": "lightning.pytorch.callbacks.LearningRateMonitor",
        "model_checkpoint": "lightning.pytorch.callbacks.ModelCheckpoint",
    },
    "optimizer": {
        "adam": "torch.optim.Adam",
        "adamw": "torch.optim.AdamW",
        "rmsprop": "torch.optim.RMSprop",
        "sgd": "torch.optim.SGD",
    },
    "lr_scheduler": {
        "cosine": "torch.optim.lr_scheduler.CosineAnnealingLR",
        "exponential": "torch.optim.lr_scheduler.ExponentialLR",
        "multi_step": "torch.optim.lr_scheduler.MultiStepLR",
        "step": "torch.optim.lr_scheduler.StepLR",
    },
    "experiment": {
        "noise_bound": "normzoo.experiments.NoiseBound",
        "random_matrices": "normzoo.experiments.RandomMatrices",
        "running_averages": "normzoo.experiments.RunningAverages",
    },
}

CIFAR_RESNETS = ("resnet20_cifar", "resnet32_cifar", "resnet44_cifar", "resnet56_cifar", "resnet110_cifar")
