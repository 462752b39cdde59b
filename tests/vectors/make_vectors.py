"""Write the golden vectors of federated LoRA aggregation.

Slow, obvious numpy float64 reference code: loops and dense matrices only, and no code shared with the
platform, so that a bug cannot hide in both places. Seeded; a second run writes the same numbers.

::

    python tests/vectors/make_vectors.py [output-dir]     # default: this folder

writes hetero.safetensors, homo.safetensors, lego.safetensors and expected.json (clients, weights, scales,
byte counts, error levels).

Conventions (PEFT): lora_A is (r, in), lora_B is (out, r), dW = s * B @ A with s = alpha/r, or
alpha/sqrt(r) when rslora is on. Client weights w_i = n_i / sum(n) over the clients of the round.
Inputs are ``<layer>/c<i>/A`` and ``<layer>/c<i>/B``, expected outputs ``<layer>/<method>/<what>``;
``<layer>/exact/delta`` is the exact average, the sum of w_i s_i B_i A_i.

- hetero: ranks 4, 2, 8, 3 (client 2 with rslora). ``flora/{A,B}`` in client order, scale 1;
  ``hetlora/{A,B,p}`` and ``zeropad/{A,B}`` with sqrt(s) folded into both factors, scale 1;
  ``flexlora/{singular_values,delta_r2,delta_r3,delta_r4,delta_r8}``; ``florist/delta`` (tau = 0.9).
- homo: rank 4, alpha 8. ``fedit/{A,B,delta}``, ``fedex/residual``, ``ffa/{A_shared,B,delta}``,
  ``rolora_a_round/{B_shared,A,delta}``, ``fedsa/{A,delta_c<i>}``, ``fair_ridge/dB`` (lambda = 0.01),
  ``fedsb/{A,B,c<i>/R,R,delta}``.
- lego: ranks 3, 2, 3 over three well separated units. ``A_gauge, B_gauge`` are the same adapters with
  permuted, rescaled and sign-flipped rank slots. ``lego_uniform`` and ``lego_weighted`` hold the centroids
  ``A, B`` (compare as a set or as a dense delta), ``mass`` and the dense deltas of each reweighting.

Tolerances: 1e-12 relative in float64, 1e-5 in float32. Compare decompositions as dense matrices only. Name
the layer in test ids: a failure in v_proj alone points to a rank above the dimension (its total rank is
17 > 8); a failure of every layer in hetero but not in homo points to scales.
"""

import json
import math
import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file

LAYERS = {  # name -> (out, in); v_proj is smaller than the total rank on purpose
    "layers.0.self_attn.q_proj": (24, 24),
    "layers.0.self_attn.v_proj": (8, 24),
    "layers.0.mlp.up_proj": (40, 24),
}


def scale(alpha, r, rslora):
    return alpha / math.sqrt(r) if rslora else alpha / r


def exact_delta(A, B, s, w):
    """sum_i w_i s_i B_i A_i, dense, one client after the other."""
    total = np.zeros((B[0].shape[0], A[0].shape[1]))
    for Ai, Bi, si, wi in zip(A, B, s, w, strict=True):
        total = total + wi * si * (Bi @ Ai)
    return total


def best_rank(D, r):
    U, S, Vt = np.linalg.svd(D, full_matrices=False)
    r = min(r, len(S))
    return (U[:, :r] * S[:r]) @ Vt[:r], S


def rel(x, y):
    return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-300))


# --------------------------------------------------------------------------- heterogeneous ranks
def hetero(rng, out, meta):
    clients = [  # rank, alpha, rslora, number of examples
        dict(rank=4, alpha=8.0, rslora=False, n=100),
        dict(rank=2, alpha=8.0, rslora=False, n=37),
        dict(rank=8, alpha=4.0, rslora=True, n=250),
        dict(rank=3, alpha=3.0, rslora=False, n=13),
    ]
    n_total = sum(c["n"] for c in clients)
    w = [c["n"] / n_total for c in clients]
    s = [scale(c["alpha"], c["rank"], c["rslora"]) for c in clients]
    ranks = [c["rank"] for c in clients]
    r_max, R = max(ranks), sum(ranks)
    tau = 0.9
    m = dict(clients=clients, weights=w, scales=s, total_rank=R, florist_tau=tau, layers={})

    for name, (d_out, d_in) in LAYERS.items():
        A = [rng.normal(size=(r, d_in)) / math.sqrt(d_in) for r in ranks]
        B = [rng.normal(size=(d_out, r)) * 0.3 for r in ranks]
        for i in range(len(clients)):
            out[f"{name}/c{i}/A"], out[f"{name}/c{i}/B"] = A[i], B[i]

        D = exact_delta(A, B, s, w)
        out[f"{name}/exact/delta"] = D

        # FLoRA: weight and scale folded once, into A; result has scale 1 (alpha = rank = R)
        A_st = np.concatenate([wi * si * Ai for Ai, si, wi in zip(A, s, w, strict=True)], axis=0)
        B_st = np.concatenate(B, axis=1)
        assert A_st.shape == (R, d_in)
        assert B_st.shape == (d_out, R)
        assert rel(B_st @ A_st, D) < 1e-13
        out[f"{name}/flora/A"], out[f"{name}/flora/B"] = A_st, B_st

        # HetLoRA: zero-pad to r_max, weights proportional to ||s_i B_i A_i||_F,
        # sqrt(s_i) folded into both factors so that the result has scale 1
        norms = [np.linalg.norm(si * (Bi @ Ai)) for Ai, Bi, si in zip(A, B, s, strict=True)]
        p = [x / sum(norms) for x in norms]
        A_h, B_h = np.zeros((r_max, d_in)), np.zeros((d_out, r_max))
        for Ai, Bi, si, pi, r in zip(A, B, s, p, ranks, strict=True):
            A_h[:r] += pi * math.sqrt(si) * Ai
            B_h[:, :r] += pi * math.sqrt(si) * Bi
        out[f"{name}/hetlora/A"], out[f"{name}/hetlora/B"] = A_h, B_h
        out[f"{name}/hetlora/p"] = np.array(p)
        # sample-size weights, same padding (the "zero padding" baseline)
        A_z, B_z = np.zeros((r_max, d_in)), np.zeros((d_out, r_max))
        for Ai, Bi, si, wi, r in zip(A, B, s, w, ranks, strict=True):
            A_z[:r] += wi * math.sqrt(si) * Ai
            B_z[:, :r] += wi * math.sqrt(si) * Bi
        out[f"{name}/zeropad/A"], out[f"{name}/zeropad/B"] = A_z, B_z

        # FlexLoRA: best rank-r approximation of the exact delta for each client rank
        S = np.linalg.svd(D, compute_uv=False)
        out[f"{name}/flexlora/singular_values"] = S
        lm = dict(flex_rel_err={}, shape=[d_out, d_in])
        for r in sorted(set(ranks)):
            X, _ = best_rank(D, r)
            out[f"{name}/flexlora/delta_r{r}"] = X
            lm["flex_rel_err"][str(r)] = rel(X, D)
            tail = math.sqrt(sum(float(v) ** 2 for v in S[r:]))
            assert abs(np.linalg.norm(D - X) - tail) < 1e-9  # Eckart-Young

        # FLoRIST: smallest p whose energy reaches tau
        e = np.cumsum(S**2) / np.sum(S**2)
        p_tau = int(np.searchsorted(e, tau) + 1)
        out[f"{name}/florist/delta"], _ = best_rank(D, p_tau)
        lm["florist_rank"] = p_tau
        lm["max_possible_rank"] = min(R, d_out, d_in)
        m["layers"][name] = lm

    up = [sum(r * (o + i) for o, i in LAYERS.values()) for r in ranks]
    m["bytes_fp32"] = dict(
        uplink_per_client=[4 * x for x in up],
        flora_downlink=4 * sum(R * (o + i) for o, i in LAYERS.values()),
        flora_downlink_cheapest=4 * sum(min(R * (o + i), o * i) for o, i in LAYERS.values()),
        flexlora_downlink_per_client=[4 * x for x in up],
        hetlora_downlink_per_client=[4 * x for x in up],
        florist_downlink=4 * sum(m["layers"][k]["florist_rank"] * (o + i) for k, (o, i) in LAYERS.items()),
        dense_downlink=4 * sum(o * i for o, i in LAYERS.values()),
    )
    meta["hetero"] = m


# --------------------------------------------------------------------------- equal ranks
def homo(rng, out, meta):
    r, alpha, lam = 4, 8.0, 0.01
    n = [10, 30, 60]
    w = [x / sum(n) for x in n]
    s = alpha / r
    k = len(n)
    m = dict(rank=r, alpha=alpha, scale=s, n=n, weights=w, fair_lambda=lam, layers={})

    for name, (d_out, d_in) in LAYERS.items():
        A = [rng.normal(size=(r, d_in)) / math.sqrt(d_in) for _ in n]
        B = [rng.normal(size=(d_out, r)) * 0.3 for _ in n]
        for i in range(k):
            out[f"{name}/c{i}/A"], out[f"{name}/c{i}/B"] = A[i], B[i]
        D = exact_delta(A, B, [s] * k, w)
        out[f"{name}/exact/delta"] = D

        A_bar = sum(wi * Ai for wi, Ai in zip(w, A, strict=True))
        B_bar = sum(wi * Bi for wi, Bi in zip(w, B, strict=True))
        out[f"{name}/fedit/A"], out[f"{name}/fedit/B"] = A_bar, B_bar
        out[f"{name}/fedit/delta"] = s * B_bar @ A_bar

        # FedEx residual, and the covariance identity that bounds its rank by (k-1) r
        res = D - s * B_bar @ A_bar
        cov = sum(wi * s * (Bi - B_bar) @ (Ai - A_bar) for wi, Ai, Bi in zip(w, A, B, strict=True))
        assert rel(cov, res) < 1e-12
        assert np.linalg.matrix_rank(res) <= min((k - 1) * r, d_out, d_in)
        out[f"{name}/fedex/residual"] = res

        # FFA / RoLoRA / FedSA on the same numbers
        A0 = rng.normal(size=(r, d_in)) / math.sqrt(d_in)
        out[f"{name}/ffa/A_shared"] = A0
        out[f"{name}/ffa/B"] = B_bar
        ffa = exact_delta([A0] * k, B, [s] * k, w)
        assert rel(s * B_bar @ A0, ffa) < 1e-13
        out[f"{name}/ffa/delta"] = ffa

        B0 = rng.normal(size=(d_out, r)) * 0.3
        out[f"{name}/rolora_a_round/B_shared"] = B0
        out[f"{name}/rolora_a_round/A"] = A_bar
        rol = exact_delta(A, [B0] * k, [s] * k, w)
        assert rel(s * B0 @ A_bar, rol) < 1e-13
        out[f"{name}/rolora_a_round/delta"] = rol

        out[f"{name}/fedsa/A"] = A_bar  # B_i stays with client i
        for i in range(k):
            out[f"{name}/fedsa/delta_c{i}"] = s * B[i] @ A_bar

        # LoRA-FAIR, ridge form: min ||D/s - (B_bar+X) A_bar||_F^2 + lam ||X||_F^2
        E = D / s - B_bar @ A_bar
        X = E @ A_bar.T @ np.linalg.inv(A_bar @ A_bar.T + lam * np.eye(r))
        out[f"{name}/fair_ridge/dB"] = X
        grad = -2 * (E - X @ A_bar) @ A_bar.T + 2 * lam * X
        assert np.abs(grad).max() < 1e-10
        assert np.linalg.norm(E - X @ A_bar) <= np.linalg.norm(E) + 1e-12

        # Fed-SB: frozen orthonormal A0, B0, average of the r x r cores
        Qa = np.linalg.qr(A0.T)[0].T
        Qb = np.linalg.qr(B0)[0]
        cores = [rng.normal(size=(r, r)) for _ in n]
        R_bar = sum(wi * Ri for wi, Ri in zip(w, cores, strict=True))
        out[f"{name}/fedsb/A"], out[f"{name}/fedsb/B"] = Qa, Qb
        for i in range(k):
            out[f"{name}/fedsb/c{i}/R"] = cores[i]
        out[f"{name}/fedsb/R"] = R_bar
        out[f"{name}/fedsb/delta"] = s * Qb @ R_bar @ Qa
        assert rel(s * Qb @ R_bar @ Qa, sum(wi * s * Qb @ Ri @ Qa for wi, Ri in zip(w, cores, strict=True))) < 1e-12

        m["layers"][name] = dict(
            shape=[d_out, d_in],
            fedit_rel_err=rel(s * B_bar @ A_bar, D),
            fair_ridge_rel_err=rel(s * (B_bar + X) @ A_bar, D),
            residual_rank=int(np.linalg.matrix_rank(res)),
        )

    both = 4 * sum(r * (o + i) for o, i in LAYERS.values())
    b_only = 4 * sum(r * o for o, _ in LAYERS.values())
    m["bytes_fp32"] = dict(
        fedit_up=both,
        fedit_down=both,
        ffa_up=b_only,
        ffa_down=b_only,
        fedsa_up=both - b_only,
        fedsb_up=4 * r * r * len(LAYERS),
        fedex_up=both,
        fedex_down_factored=both + 4 * sum(min(k * r * (o + i), o * i) for o, i in LAYERS.values()),
    )
    meta["homo"] = m


# --------------------------------------------------------------------------- LoRA-LEGO
def lego(rng, out, meta):
    """Clusters that no sensible k-means can miss: three far-apart units, tiny noise.

    Expected values are computed from the known membership, not from k-means.
    """
    spec = [  # which prototype each rank slot of the client holds
        dict(units=[0, 1, 2], alpha=6.0, n=50),
        dict(units=[2, 0], alpha=4.0, n=30),
        dict(units=[1, 0, 2], alpha=1.5, n=20),
    ]
    w = [c["n"] / 100 for c in spec]
    s = [c["alpha"] / len(c["units"]) for c in spec]
    k = 3
    total_units = sum(len(c["units"]) for c in spec)
    r_bar = total_units / len(spec)
    m = dict(
        clients=[dict(c, rank=len(c["units"])) for c in spec],
        weights=w,
        scales=s,
        k=k,
        total_units=total_units,
        mean_rank=r_bar,
        layers={},
    )

    for name, (d_out, d_in) in LAYERS.items():
        # orthogonal prototypes with equal halves (||a|| = ||b||) and a dominant positive entry in a
        Pa = 2.0 * np.linalg.qr(rng.normal(size=(d_in, k)))[0].T
        Pb = 2.0 * np.linalg.qr(rng.normal(size=(d_out, k)))[0].T
        for j in range(k):
            hot = int(np.argmax(np.abs(Pa[j])))
            Pa[j] *= np.sign(Pa[j, hot])
            Pa[j, hot] += 1.0
            Pb[j] *= np.linalg.norm(Pa[j]) / np.linalg.norm(Pb[j])
        pool = []  # (prototype, weight, a, b) in balanced gauge with sqrt(s) folded in
        for i, c in enumerate(spec):
            rows, cols = [], []
            for j in c["units"]:
                a = Pa[j] + 0.01 * rng.normal(size=d_in)
                b = Pb[j] + 0.01 * rng.normal(size=d_out)
                g = math.sqrt(np.linalg.norm(b) / np.linalg.norm(a))
                a, b = a * g, b / g  # now the two halves have the same norm
                pool.append((j, w[i], a, b))
                rows.append(a / math.sqrt(s[i]))
                cols.append(b / math.sqrt(s[i]))
            out[f"{name}/c{i}/A"], out[f"{name}/c{i}/B"] = np.array(rows), np.array(cols).T
            # same adapter after a change of gauge: permuted, rescaled, sign-flipped rank slots
            perm = rng.permutation(len(rows))
            c_g = np.exp(rng.normal(size=len(rows))) * rng.choice([-1.0, 1.0], size=len(rows))
            Ag = np.array(rows)[perm] * c_g[:, None]
            Bg = np.array(cols)[perm].T / c_g[None, :]
            assert rel(Bg @ Ag, np.array(cols).T @ np.array(rows)) < 1e-12
            out[f"{name}/c{i}/A_gauge"], out[f"{name}/c{i}/B_gauge"] = Ag, Bg

        # every unit is nearest to its own prototype, by a wide margin
        feats = [np.concatenate([a, b]) for _, _, a, b in pool]
        protos = [np.mean([f for f, u in zip(feats, pool, strict=True) if u[0] == j], axis=0) for j in range(k)]
        for f, u in zip(feats, pool, strict=True):
            d = [np.linalg.norm(f - q) for q in protos]
            assert int(np.argmin(d)) == u[0]
            assert sorted(d)[1] > 10 * sorted(d)[0]

        for weighted in (False, True):
            tag = "weighted" if weighted else "uniform"
            cents, inf_f, l2_f, mass = [], [], [], []
            for j in range(k):
                mem = [(wi if weighted else 1.0, np.concatenate([a, b])) for u, wi, a, b in pool if u == j]
                tot = sum(x for x, _ in mem)
                mu = sum(x * f for x, f in mem) / tot
                cents.append(mu)
                inf_f.append(sum(x * np.abs(f).max() for x, f in mem) / tot / np.abs(mu).max())
                l2_f.append(sum(x * np.linalg.norm(f) for x, f in mem) / tot / np.linalg.norm(mu))
                mass.append(sum(wi for u, wi, _, _ in pool if u == j))
            C = np.array(cents)
            out[f"{name}/lego_{tag}/A"], out[f"{name}/lego_{tag}/B"] = C[:, :d_in], C[:, d_in:].T
            out[f"{name}/lego_{tag}/mass"] = np.array(mass)
            plain = sum(np.outer(c[d_in:], c[:d_in]) for c in cents)
            out[f"{name}/lego_{tag}/delta_plain"] = plain
            o = math.sqrt(r_bar / k)
            out[f"{name}/lego_{tag}/delta_inf"] = o * sum(
                f**2 * np.outer(c[d_in:], c[:d_in]) for f, c in zip(inf_f, cents, strict=True)
            )
            out[f"{name}/lego_{tag}/delta_l2"] = o * sum(
                f**2 * np.outer(c[d_in:], c[:d_in]) for f, c in zip(l2_f, cents, strict=True)
            )
            out[f"{name}/lego_{tag}/delta_mass"] = sum(
                x * np.outer(c[d_in:], c[:d_in]) for x, c in zip(mass, cents, strict=True)
            )
            assert all(f >= 1 - 1e-12 for f in l2_f)  # triangle inequality: averaging never lengthens

        # k = number of units: every unit its own cluster
        whole = sum(np.outer(b, a) for _, _, a, b in pool)
        out[f"{name}/lego_full/delta_plain"] = whole  # plain = unweighted sum of all client deltas
        fed = exact_delta(
            [out[f"{name}/c{i}/A"] for i in range(len(spec))],
            [out[f"{name}/c{i}/B"] for i in range(len(spec))],
            s,
            w,
        )
        mass_full = sum(wi * np.outer(b, a) for _, wi, a, b in pool)
        assert rel(mass_full, fed) < 1e-12  # mass scaling at k = total is exact federated averaging
        out[f"{name}/exact/delta"] = fed
        m["layers"][name] = dict(
            shape=[d_out, d_in],
            mass_vs_exact_rel_err=rel(out[f"{name}/lego_weighted/delta_mass"], fed),
        )
    meta["lego"] = m


def main(argv):
    target = pathlib.Path(argv[1]) if len(argv) > 1 else pathlib.Path(__file__).resolve().parent
    target.mkdir(parents=True, exist_ok=True)
    meta = {"format": 1, "dtype": "float64", "seed": 20240913}
    for offset, (label, fn) in enumerate([("hetero", hetero), ("homo", homo), ("lego", lego)]):
        tensors = {}
        fn(np.random.default_rng(meta["seed"] + offset), tensors, meta)
        tensors = {k: np.ascontiguousarray(v, dtype=np.float64) for k, v in tensors.items()}
        save_file(tensors, str(target / f"{label}.safetensors"))
    (target / "expected.json").write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv)
