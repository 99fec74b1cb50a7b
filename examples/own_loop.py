"""Multi-task SAC with a custom training loop: a collector, a replay buffer and a learner."""

from mtrl import (
    MTSAC,
    AgentConfig,
    Collector,
    Learner,
    LearnerConfig,
    ReplayBuffer,
    evaluate,
    get_benchmark,
    make_vector_env,
)


def main(steps: int = 1_000, random_steps: int = 500, episodes: int = 2) -> None:
    """Train on two tasks for a few vector steps, save the policy and evaluate it."""
    benchmark = get_benchmark("", ("reach-v3", "drawer-close-v3"))
    envs = make_vector_env(benchmark)  # one environment per task, each in its own process
    sizes = envs.observation_size, envs.action_size
    agent = MTSAC(benchmark.tasks, AgentConfig(hidden_sizes=(128, 128)), *sizes, seed=0)
    learner = Learner(agent, LearnerConfig(surgery="pcgrad"), seed=1)
    replay = ReplayBuffer(100_000, envs.n_tasks, *sizes, seed=2)
    collector = Collector(envs, agent, seed=3)
    collector.reset(seed=0)  # the goals' seed
    for step in range(steps):
        learning = step >= random_steps
        collector.act(uniform=not learning)  # the simulators start to step
        if learning:
            metrics = learner.step(replay)  # meanwhile, on the transitions stored before
        collector.store(collector.wait(), replay)
        if learning and step % 100 == 0:
            print(step, collector.statistics.values(envs.tells_success))
            print(step, dict(zip(agent.tasks, metrics["critic_loss"].tolist(), strict=True)))
    envs.close()
    agent.save("own_loop.safetensors")
    print(evaluate(agent, benchmark, seed=0, episodes=episodes))


if __name__ == "__main__":  # simulators run in other processes
    main()
