"""Handwritten digits (scikit-learn's 1,797 images) with a small convolutional network: plain PyTorch and Accelerate.

python examples/digits.py --steps 100                       by hand, one process
holdfast run examples/digits.yaml                           here, with a run directory
holdfast submit examples/digits.yaml                        on the cluster: two nodes, survives preemption
"""

import argparse

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn

import holdfast

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=holdfast.setting("max_steps", 200))
parser.add_argument("--batch", type=int, default=64, help="images per step, over all processes")
parser.add_argument("--save-every", type=int, default=50)
args = parser.parse_args()

torch.manual_seed(holdfast.setting("seed", 0))
accelerator = Accelerator(cpu=not torch.cuda.is_available())
images, labels = load_digits(return_X_y=True)
images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
labels = torch.tensor(labels)
train, test = slice(0, 1500), slice(1500, None)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layers(pixels)


model = Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=holdfast.setting("lr", 1e-3))
model, optimizer = accelerator.prepare(model, optimizer)


def batch_of(step: int) -> torch.Tensor:
    """Which images this process sees at a step. A function of the step, so that there is no place in the data to save."""
    per_epoch = 1500 // args.batch
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(step // per_epoch))
    start = step % per_epoch * args.batch
    return order[start : start + args.batch][accelerator.process_index :: accelerator.num_processes]


step, found = 0, holdfast.latest_checkpoint()
if found:
    accelerator.load_state(str(found))
    step = holdfast.step_of(found)
while step < args.steps:
    chosen = batch_of(step)
    loss = nn.functional.cross_entropy(model(images[train][chosen].to(accelerator.device)), labels[train][chosen].to(accelerator.device))
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
    step += 1
    holdfast.progress(step)
    if step % 10 == 0:
        holdfast.log(step=step, loss=loss)
    stop = holdfast.stop_agreed()
    if stop or step % args.save_every == 0 or step == args.steps:
        folder = holdfast.new_checkpoint(step)
        accelerator.save_state(str(folder))
        accelerator.wait_for_everyone()
        holdfast.commit(folder)
    if stop:
        holdfast.exit_requeue()

model.eval()
with torch.no_grad():
    guessed = model(images[test].to(accelerator.device)).argmax(1).cpu()
accuracy = (guessed == labels[test]).float().mean().item()
holdfast.log(step=step, accuracy=accuracy)
if accelerator.is_main_process:
    print(f"step {step}: {accuracy:.1%} of the {len(guessed)} test images are right", flush=True)
