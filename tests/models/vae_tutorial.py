"""The VAE script that every tutorial prints (pytorch/examples, vae/main.py), as a function of its model class."""

import torch
from torch import nn, optim
from torch.nn import functional as F


class TutorialVAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(784, 400)
        self.fc21 = nn.Linear(400, 20)
        self.fc22 = nn.Linear(400, 20)
        self.fc3 = nn.Linear(20, 400)
        self.fc4 = nn.Linear(400, 784)

    def encode(self, x):
        h1 = F.relu(self.fc1(x))
        return self.fc21(h1), self.fc22(h1)

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def decode(self, z):
        h3 = F.relu(self.fc3(z))
        return torch.sigmoid(self.fc4(h3))

    def forward(self, x):
        mu, logvar = self.encode(x.view(-1, 784))
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar


def loss_function(recon_x, x, mu, logvar):
    BCE = F.binary_cross_entropy(recon_x, x.view(-1, 784), reduction="sum")
    KLD = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return BCE + KLD


def train(make_model, data, epochs, batch_size=64, seed=1):
    """Train on images [N, 1, 28, 28] as the script does; returns the model and the loss of each step, per image."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    model.train()
    for _ in range(epochs):
        for batch in data.split(batch_size):
            optimizer.zero_grad()
            recon_batch, mu, logvar = model(batch)
            loss = loss_function(recon_batch, batch, mu, logvar)
            loss.backward()
            losses.append(loss.item() / len(batch))
            optimizer.step()
    return model, losses


def blobs(n, size=28, seed=0):
    """Smooth grey images [n, 1, size, size]: one bright spot each, of random place and width."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(n, 2, 1, 1, generator=generator) * size * 0.6 + size * 0.2
    width = torch.rand(n, 1, 1, generator=generator) * size * 0.1 + size * 0.07
    axis = torch.arange(size, dtype=torch.float32)
    square = (axis.view(1, size, 1) - place[:, 0]) ** 2 + (axis.view(1, 1, size) - place[:, 1]) ** 2
    return torch.exp(-square / (2 * width**2)).unsqueeze(1)
