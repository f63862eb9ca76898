"""Makes tests/data/scan_fixtures.txt with torch and TorchRL, in f64.

    python3 tests/reference/make_scan_fixtures.py [output directory]

Three windows of 11 steps with terminations and truncations, among them some at the last step and one step that is both.
`final` is the value of the observation behind each step, which TorchRL is given as next_state_value where the episode
or the window ends. Format as in make_nn_fixtures.py.
"""

import torch
from fixture_lines import Lines
from torchrl.objectives.value import functional

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
lines = Lines("scan_fixtures.txt")
BATCH, TIME, GAMMA, LAMBDA, RHO, C = 3, 11, 0.9, 0.8, 1.3, 0.9

reward, value, final = (torch.randn(BATCH, TIME) for _ in range(3))
log_pi, log_mu = -torch.rand(BATCH, TIME), -torch.rand(BATCH, TIME)
terminated, truncated = torch.zeros(2, BATCH, TIME, dtype=torch.bool)
terminated[0, 3] = terminated[1, 10] = terminated[1, 6] = True
truncated[0, 7] = truncated[1, 2] = truncated[2, 10] = truncated[1, 6] = True
for name, x in dict(reward=reward, value=value, final=final, log_pi=log_pi, log_mu=log_mu).items():
    lines.put(name, x)
lines.put("terminated", terminated)
lines.put("truncated", truncated)
lines.put("options", torch.tensor([GAMMA, LAMBDA, RHO, C]))

done = terminated | truncated
end = done.clone()
end[:, -1] = True
behind = torch.where(end, final, torch.cat([value[:, 1:], final[:, -1:]], 1))


def given(*tensors):
    return [t.unsqueeze(-1) for t in tensors]


advantage, returns = functional.generalized_advantage_estimate(
    GAMMA, LAMBDA, *given(value, behind, reward, done, terminated))
lines.put("gae.advantages", advantage)
lines.put("gae.returns", returns)
lines.put("td_lambda", functional.td_lambda_return_estimate(GAMMA, LAMBDA, *given(behind, reward, done, terminated)))
lines.put("td1", functional.td1_return_estimate(GAMMA, *given(behind, reward, done, terminated)))
lines.put("td0", functional.td0_return_estimate(GAMMA, *given(behind, reward, terminated)))
advantage, vs = functional.vtrace_advantage_estimate(
    GAMMA, *given(log_pi, log_mu, value, behind, reward, done, terminated), rho_thresh=RHO, c_thresh=C)
lines.put("vtrace.advantages", advantage)
lines.put("vtrace.vs", vs)
lines.write()
