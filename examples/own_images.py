# %% [markdown]
# # A CA-Stream on your own images
#
# From an image folder to a measured stream, in one file. Run it as a script, or cell by
# cell in an editor that supports `# %%`.
#
#     pip install 'timm_castream[demo]'
#
# The folder has one folder of images for each class:
# `my_images/train/cat/*.jpg`, `my_images/val/cat/*.jpg`, ...

# %% Imports
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from torch.nn.functional import cross_entropy

import timm_castream
from timm_castream.evaluate import evaluate
from timm_castream.visualize import explain

# %% Settings
IMAGES = 'my_images'
NETWORK = 'resnet18'
PRETRAINED = True  # timm's ImageNet weights
IMAGE_SIZE = 224
CLASSIFIER_EPOCHS = 4
STREAM_EPOCHS = 2  # as the evidence
DEVICE = 'cpu'  # 'cuda' for a GPU

torch.manual_seed(0)

# %% The images
training_set = create_dataset('', IMAGES, split='train', is_training=True)
validation_set = create_dataset('', IMAGES, split='val')
classes = training_set.reader.class_to_idx
print(f'{len(training_set)} training images, {len(validation_set)} validation images')
print(f'classes: {", ".join(classes)}')

model = timm.create_model(NETWORK, pretrained=PRETRAINED, num_classes=len(classes))
model = model.to(DEVICE)
config = resolve_model_data_config(model, {'img_size': IMAGE_SIZE})


def load(dataset, is_training):
    return create_loader(
        dataset,
        config['input_size'],
        batch_size=16,
        is_training=is_training,
        no_aug=is_training,  # with random crops the saliency gains nothing: docs/evidence.md
        mean=config['mean'],
        std=config['std'],
        interpolation=config['interpolation'],
        crop_pct=config['crop_pct'],
        num_workers=2,
        persistent_workers=False,
        use_prefetcher=False,
        device=torch.device(DEVICE),
    )


def train(parameters, learning_rate, epochs, title):
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    loader = load(training_set, is_training=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for epoch in range(epochs):
        total = 0.0
        for x, labels in loader:
            loss = cross_entropy(model(x.to(DEVICE)), labels.to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f'{title}, epoch {epoch + 1}: loss {total / len(loader):.3f}')


# %% The plain network learns the classes: only its classifier is fitted
model.eval()
for parameter in model.parameters():
    parameter.requires_grad_(False)
classifier = model.get_classifier()
for parameter in classifier.parameters():
    parameter.requires_grad_(True)
train(classifier.parameters(), 1e-2, CLASSIFIER_EPOCHS, 'classifier')

# %% The stream starts where average pooling is: both poolings give the same logits
timm_castream.attach(model, stream_init='gap', freeze_backbone=True)
x, _ = next(iter(load(validation_set, is_training=False)))
model.eval()
with torch.no_grad():
    both = timm_castream.forward_both(model, x.to(DEVICE))
difference = (both['ca'] - both['gap']).abs().max()
print(f'Largest difference of the logits before training: {difference:.1e}')

# %% The stream trains beside the frozen network
model.train()
train(model.castream.parameters(), 1e-4, STREAM_EPOCHS, 'stream')
model.eval()

# %% Both poolings are measured on the validation images
report = evaluate(
    model,
    load(validation_set, is_training=False),
    ('attention', 'grad_cam', 'random'),
    metrics=('average_drop', 'average_gain', 'average_increase'),
    progress=True,
)
print(report)
print('CA - GAP of Average Gain with Grad-CAM:', report.difference('grad_cam', 'average_gain'))

# %% Pictures of the first validation images
paths = [f'{IMAGES}/val/{validation_set.filename(i)}' for i in range(2)]
for path in explain(model, paths, ('attention', 'grad_cam'), 'explained').pictures:
    print(path)

# %% The stream is saved alone
timm_castream.save_stream(model, 'my_stream.safetensors')
