"""Whole training runs in jets against the roots-of-unity engine: models, optimizers, schedules."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from leaveout.jets import Space, install, restore
from leaveout.training.loop import PaperAdam
from oracles import roots
from oracles.agreement import TOLERANCES, assert_close

STEPS, EXAMPLES, DEGREE, RADIUS = 4, 3, 3, 0.08


def mlp():
    net = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    return net, (torch.randn(STEPS, EXAMPLES, 5, dtype=torch.float64), torch.randint(0, 3, (STEPS, EXAMPLES)))


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2),
            nn.Conv2d(4, 4, 3, groups=2, stride=2), nn.Sigmoid(),
        )  # fmt: skip
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


def cnn():
    return Cnn(), (torch.randn(STEPS, EXAMPLES, 1, 10, 10, dtype=torch.float64), torch.randint(0, 3, (STEPS, EXAMPLES)))


def classify(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def causal(config):
    def make():
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        model.config.use_cache = False
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        ids = torch.randint(0, 11, (STEPS, EXAMPLES, 6))
        labels = ids.clone()
        labels[:, 0, :3] = -100
        return model, (ids, labels)

    return make


def next_token(model, batch):
    """Mean loss over the tokens that have a label, per example."""
    logits, labels = model(input_ids=batch[0], attention_mask=torch.ones_like(batch[0])).logits[:, :-1], batch[1][:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return each.view(labels.shape).sum(-1) / (labels != -100).sum(-1)


GPT2 = transformers.GPT2Config(
    vocab_size=11, n_embd=8, n_head=2, n_layer=1, n_positions=8, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    bos_token_id=0, eos_token_id=0,
)  # fmt: skip
LLAMA = transformers.LlamaConfig(
    vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
NEOX = transformers.GPTNeoXConfig(
    vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, bos_token_id=0,
    eos_token_id=0, hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


ignore_peft = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::FutureWarning:peft")


def lora():
    peft = pytest.importorskip("peft")
    model, data = causal(LLAMA)()
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
    model = peft.get_peft_model(model, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.5)
    return model.eval(), data


MODELS = {
    "mlp": (mlp, classify), "cnn": (cnn, classify), "gpt2": (causal(GPT2), next_token),
    "llama": (causal(LLAMA), next_token), "gpt_neox": (causal(NEOX), next_token), "lora": (lora, next_token),
}  # fmt: skip


def tilted(model, batch):
    """Plus a linear term, so that no gradient is near 0, where a root with epsilon outside is singular."""
    return classify(model, batch) + 0.5 * sum(p.sum() for p in model.parameters())


OPTIMIZERS = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), roots.Sgd(0.1)),
    "sgd_decay": (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1), roots.Sgd(0.1, weight_decay=0.1)),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), roots.Sgd(0.05, 0.9)),
    "nesterov": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True), roots.Sgd(0.05, 0.9, True)),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01, eps=0.1, weight_decay=0.1),
             roots.Adam(0.01, eps=0.1, weight_decay=0.1)),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.01, eps=0.1, weight_decay=0.1),
              roots.Adam(0.01, eps=0.1, weight_decay=0.1, decoupled=True)),
    "adam_fused": (lambda p: torch.optim.Adam(p, lr=0.01, eps=0.1, weight_decay=0.1, fused=True),
                   roots.Adam(0.01, eps=0.1, weight_decay=0.1)),
    "adamw_fused": (lambda p: torch.optim.AdamW(p, lr=0.01, eps=0.1, weight_decay=0.1, fused=True),
                    roots.Adam(0.01, eps=0.1, weight_decay=0.1, decoupled=True)),
    "paper_adam": (lambda p: PaperAdam(p, lr=0.01, betas=(0.9, 0.999), eps=0.05),
                   roots.Adam(0.01, eps=0.05, eps_inside=True)),
}  # fmt: skip


def in_jets(model, loss, data, psi, make_optimizer, clip=None, schedule=None, dtype=torch.complex128, split=1):
    """Train with weights 1 - z psi; coefficients [degree + 1, *shape] of each trained parameter (direction 1 of 2)."""
    space = Space(DEGREE, 2, dtype)
    model = model.to(space.real_dtype)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    replaced = install(model, {n: space.constant(p) for n, p in trained.items()})
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(params)
    scheduler = None if schedule is None else torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(split):
            rows = slice(part, None, split)
            h = torch.zeros(DEGREE, 2, EXAMPLES, dtype=dtype)[:, :, rows]
            h[0, 1] = -psi[step][rows]
            weights = space.jet(torch.ones(h.shape[2]), h)
            batch = tuple(d[step][rows].to(space.real_dtype) if d.is_floating_point() else d[step][rows] for d in data)
            ((loss(model, batch) * weights).sum() / EXAMPLES).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    out = {n: p.detach() for n, p in model.named_parameters() if n in trained}
    restore(model, replaced)
    return out, space


def at_roots(model, loss, data, psi, optimizer, clip=None, schedule=None):
    model = model.double()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    gradient = roots.Gradient(model, loss, names)
    batches = [tuple(d[step] for d in data) for step in range(STEPS)]
    circle = roots.Circle(12, RADIUS, clip, schedule)
    params = roots.train(gradient, batches, psi, copy.deepcopy(optimizer), circle)
    return {name: roots.coefficients(values, RADIUS, DEGREE) for name, values in params.items()}


def check(jets, wanted, kind="roots"):
    assert set(jets) == set(wanted)
    for name, jet in jets.items():
        assert float(jet.h[:, 0].abs().max()) == 0.0  # the direction without a perturbation stays constant
        assert_close(jet.coefficients()[:, 1].to(torch.complex128), wanted[name], kind)
    assert max(float(jet.h[2].abs().max()) for jet in jets.values()) > 1e2 * TOLERANCES["roots"]


def directions():
    return 0.5 * torch.randn(STEPS, EXAMPLES, dtype=torch.complex128)


@ignore_peft
@pytest.mark.parametrize("name", MODELS)
def test_model_agrees_with_roots_of_unity(name):
    make, loss = MODELS[name]
    model, data = make()
    psi = directions()
    make_optimizer, oracle = OPTIMIZERS["momentum"]
    wanted = at_roots(copy.deepcopy(model), loss, data, psi, oracle)
    jets, space = in_jets(copy.deepcopy(model).double(), loss, data, psi, make_optimizer)
    check(jets, wanted)
    assert space.nonsmooth == {}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_agrees_with_roots_of_unity(name):
    model, data = mlp()
    psi = directions()
    make_optimizer, oracle = OPTIMIZERS[name]
    loss = tilted if "adam" in name else classify
    wanted = at_roots(copy.deepcopy(model), loss, data, psi, oracle)
    check(in_jets(model.double(), loss, data, psi, make_optimizer)[0], wanted)


def test_schedule_clipping_and_accumulation_agree_with_roots_of_unity():
    model, data = mlp()
    psi = directions()
    decay = lambda step: 1 - step / STEPS  # noqa: E731
    wanted = at_roots(
        copy.deepcopy(model), classify, data, psi, roots.Sgd(0.1), clip=0.3, schedule=lambda step: 0.1 * decay(step)
    )
    make = OPTIMIZERS["sgd"][0]
    jets, space = in_jets(model.double(), classify, data, psi, make, clip=0.3, schedule=decay, split=3)
    check(jets, wanted)
    assert space.nonsmooth["clamp"] == STEPS  # min(1, limit / norm) has a kink, and the run says so


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_single_precision_agrees(name):
    make, loss = MODELS[name]
    model, data = make()
    psi = directions()
    double, _ = in_jets(copy.deepcopy(model), loss, data, psi, OPTIMIZERS["paper_adam"][0])
    single, _ = in_jets(copy.deepcopy(model), loss, data, psi, OPTIMIZERS["paper_adam"][0], dtype=torch.complex64)
    for parameter in double:
        assert_close(single[parameter].coefficients().to(torch.complex128), double[parameter].coefficients(), "single")


def test_degree_zero_is_the_plain_run():
    model, data = mlp()
    plain = copy.deepcopy(model).double()
    optimizer = OPTIMIZERS["adamw"][0](plain.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        classify(plain, [d[step] for d in data]).mean().backward()
        optimizer.step()
    jets, _ = in_jets(model, classify, data, directions(), OPTIMIZERS["adamw"][0])
    for name, p in plain.named_parameters():
        assert_close(jets[name].c, p.detach(), "exact")


def test_real_directions_need_no_complex_numbers():
    model, data = mlp()
    psi = directions().real
    as_complex, _ = in_jets(copy.deepcopy(model), classify, data, psi.to(torch.complex128), OPTIMIZERS["paper_adam"][0])
    as_real, _ = in_jets(copy.deepcopy(model), classify, data, psi, OPTIMIZERS["paper_adam"][0], dtype=torch.float64)
    for name in as_real:
        assert as_real[name].h.dtype == torch.float64
        assert_close(as_real[name].h, as_complex[name].h.real, "exact")


def test_tied_weights_stay_tied():
    model, _ = causal(GPT2)()
    space = Space(1, 1)
    replaced = install(model, {"transformer.wte.weight": space.constant(model.transformer.wte.weight)})
    assert model.lm_head.weight is model.transformer.wte.weight
    restore(model, replaced)
    assert type(model.lm_head.weight) is nn.Parameter
    assert model.lm_head.weight is model.transformer.wte.weight


@ignore_peft
def test_frozen_weights_carry_no_series():
    model, _data = lora()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in n for n in names)


def test_complex_erf_agrees_with_scipy():
    special = pytest.importorskip("scipy.special")
    z = torch.complex(2 * torch.randn(500, dtype=torch.float64), 2 * torch.randn(500, dtype=torch.float64))
    z[:3] = torch.tensor([0, 1j, 1e-12 + 0.3j])
    wanted = torch.from_numpy(special.erf(z.numpy()))
    assert float(((roots.complex_erf(z) - wanted).abs() / wanted.abs().clamp(min=1e-300)).max()) < 1e-12


def test_coefficients_are_those_of_a_known_function():
    z = roots.nodes(32, 0.5)
    found = roots.coefficients(z.exp(), 0.5, 6)
    wanted = torch.tensor([1 / torch.tensor(float(k)).lgamma().exp() / max(k, 1) for k in range(7)])
    assert_close(found[1:].real, wanted[1:].double(), "single")
    assert_close(found, roots.coefficients(roots.nodes(64, 0.7).exp(), 0.7, 6), "exact")
    with pytest.raises(ValueError, match="degree 6 needs more than 6 points"):
        roots.coefficients(z[:6], 0.5, 6)
