"""An augmentation of your own: train.py --data-augmentation docs/my_augmentation.py:build."""

from torchvision.transforms import v2


def build():
    """Return a transform of a training image and its boxes: turned a little, in other colors."""
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.RandomRotation(10, fill=114),
            v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3),
            v2.SanitizeBoundingBoxes(min_size=2),  # drops what the rotation leaves of some objects
        ]
    )
